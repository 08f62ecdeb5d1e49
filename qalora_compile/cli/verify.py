"""`verify`: compare RUN, FOLDED, DIR, .onnx, .gguf on inputs, node by node, or by proof."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.cli.exit_codes import FAILED, exit_code
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import console, print_json, print_summary, print_table, steps
from qalora_compile.errors import UserInputError
from qalora_compile.files import check_output
from qalora_compile.untrusted.artifacts import ArtifactKind, find_artifact

if TYPE_CHECKING:  # imported lazily, so that a certificate is checked without torch
    from qalora_compile.api.verify import VerifySpec
    from qalora_compile.verify.compare import Report
    from qalora_compile.verify.numeric.report import ModeReport, NumericReport
    from qalora_compile.verify.proof.certificate import Certificate

EXAMPLES = """examples:
  qalora-compile verify run folded --max-abs 1e-4
  qalora-compile verify folded edge --max-rel 1e-4 --inputs 8
  # on the fused kernels only
  qalora-compile verify folded edge --max-rel 1e-4 --library
  qalora-compile verify folded edge/model.onnx --max-abs 1e-3 --json
  # read back by its own library
  qalora-compile verify folded edge/model.gguf --max-rel 1e-2
  qalora-compile verify folded edge --prove --certificate equal.json
  # parts that were only tried on samples are no failure
  qalora-compile verify folded edge --prove --allow-sampled
  # a model's folder, and the file that optimum or GenAI's builder made of it
  qalora-compile verify model their.onnx --prove
  # check it again, without torch
  qalora-compile verify --certificate equal.json
  # node by node, without a tolerance
  qalora-compile verify folded edge --numeric
  qalora-compile verify folded edge --numeric --html report.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("a", metavar="A", nargs="?", help="RUN, FOLDED, DIR, .onnx, .xml or .gguf")
    parser.add_argument("b", metavar="B", nargs="?", help="likewise; one of them RUN or FOLDED")
    parser.add_argument("--max-abs", type=float, metavar="F", help="largest difference allowed")
    parser.add_argument(
        "--max-rel", type=float, metavar="F", help="… as a fraction of the output scale"
    )
    parser.add_argument("--inputs", type=int, default=4, metavar="N", help="random inputs to try")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs")
    parser.add_argument(
        "--library", action="store_true", help="run exported models with the operator library only"
    )
    parser.add_argument(
        "--prove", action="store_true", help="prove equality from all coefficients and the graph"
    )
    parser.add_argument(
        "--certificate", metavar="FILE", help="write a certificate; without A and B, check FILE"
    )
    parser.add_argument(
        "--allow-sampled",
        action="store_true",
        help="a proof with parts that were only tried on samples (SAMPLED) ends with 0, not with 3",
    )
    parser.add_argument(
        "--numeric",
        action="store_true",
        help="compare along the graph, relative to float64, also on unusual inputs, at the "
        "optimization levels of --levels, with the operator library and without; Ctrl-C shows what "
        "is done; exit 2: UNDECIDED",
    )
    parser.add_argument(
        "--levels",
        metavar="LIST",
        help="with --numeric: of disabled,basic,extended,all (default: disabled,all)",
    )
    parser.add_argument("--html", metavar="FILE", help="write an HTML page of the result")
    parser.add_argument(
        "--card",
        action="store_true",
        help="with --prove: write the verdict into the model card of B (README.md)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.inputs < 1:
        raise UserInputError(f"--inputs is {options.inputs}", hint="use 1 or more")
    if options.a is None and options.certificate:
        if options.html:
            raise UserInputError("checking a certificate writes no page", hint="--prove does")
        return _check_again(options)
    if options.a is None or options.b is None:
        raise UserInputError("two things to compare are needed", hint="verify A B --max-rel 1e-4")
    if options.levels and not options.numeric:
        raise UserInputError("--levels belongs to --numeric", hint="add --numeric")
    if options.card:
        _check_card(options)
    spec = verify_spec(options)
    if options.prove:
        return _prove(spec, options)
    if options.numeric:
        return _numeric(spec, options)
    if options.certificate:
        raise UserInputError("only a proof gives a certificate", hint="add --prove")
    return _compare(spec, options)


def verify_spec(options: argparse.Namespace) -> VerifySpec:
    """The specification in the options.

    Raises:
        UserInputError: a value is out of range; or a page or certificate would replace something
            else, which is checked before the work is done.
    """
    from qalora_compile.api.verify import VerifySpec

    if options.certificate:
        inputs = [options.a, options.b]
        check_output(Path(options.certificate), overwrite=True, inputs=inputs, is_file=True)
    levels = tuple(options.levels.split(",")) if options.levels else None
    return spec_of(VerifySpec, options, levels=levels)


def _compare(spec: VerifySpec, options: argparse.Namespace) -> int:
    from qalora_compile.api.verify import compare_on_inputs
    from qalora_compile.verify.compare import Tolerance

    if options.max_abs is None and options.max_rel is None:
        raise UserInputError(
            "no tolerance was given",
            hint="add --max-abs 1e-4 or --max-rel 1e-4, for which there is no default; or --prove "
            "or --numeric, which need none",
        )
    with steps():
        found = compare_on_inputs(spec, Tolerance(max_abs=options.max_abs, max_rel=options.max_rel))
    if options.json:
        first, *others = [found.reports[used].to_json() for used in sorted(found.reports)]
        print_json(first | ({"with_library": others[0]} if others else {}))
    else:
        for used, report in found.reports.items():
            _show(report, options, library=used)
    return exit_code(found.decisive.verdict)


def _prove(spec: VerifySpec, options: argparse.Namespace) -> int:
    from qalora_compile.api.verify import prove_all

    with steps():
        found = prove_all(spec)
    stated = options.certificate
    if stated and len(found) > 1:
        for half in found:
            check_output(_of_half(stated, half), overwrite=True, inputs=[], is_file=True)
    codes = []
    for half, certificate in found.items():
        options.certificate = str(_of_half(stated, half)) if stated else None
        if options.certificate:
            certificate.write(options.certificate)
        codes.append(_answer(certificate, [], options))
    worst = next((name for name, code in zip(found, codes, strict=True) if code), "")
    if options.card:
        from qalora_compile.api.edge import read_edge_record
        from qalora_compile.api.model_card import add_findings

        edge = Path(options.b)
        shown = found.get(worst) or next(iter(found.values()))
        add_findings(edge, read_edge_record(edge), certificate=shown)
    return next((code for code in codes if code), 0)


def _of_half(certificate: str, half: str) -> Path:
    """The file of one graph's certificate: `equal-encoder.json`."""
    path = Path(certificate)
    return path.with_name(f"{path.stem}-{half}{path.suffix}") if half else path


def _check_card(options: argparse.Namespace) -> None:
    """Refuse `--card` before the work if there is nothing to write, or nowhere.

    Raises:
        UserInputError: it is not a proof, or B is no edge folder.
    """
    if not options.prove:
        raise UserInputError("only a proof gives a verdict for a card", hint="add --prove")
    if not (Path(options.b) / "qalora.json").is_file():
        raise UserInputError(
            f"{options.b} is no edge folder, so it has no model card",
            where=options.b,
            hint="give the folder that export or quantize wrote as B",
        )


def _numeric(spec: VerifySpec, options: argparse.Namespace) -> int:
    from qalora_compile.api.verify import compare_along

    if options.max_abs is not None or options.max_rel is not None:
        raise UserInputError(
            "--numeric takes no tolerance", hint="leave --max-abs and --max-rel out"
        )
    with steps():
        report = compare_along(spec)
    if options.json:
        print_json(report.to_json())
    else:
        _show_numeric(report, options)
    return exit_code(report.verdict)


def _check_again(options: argparse.Namespace) -> int:
    from qalora_compile.verify.proof.prove import check_certificate

    with steps():
        certificate, problems = check_certificate(options.certificate)
    return _answer(certificate, problems, options)


def _show_numeric(report: NumericReport, options: argparse.Namespace) -> None:
    print_table(
        f"execution modes of {options.b}",
        ("", "verdict", "values", "largest ratio", "at"),
        [(w.name, w.verdict, len(w.rows), *_worst(w)) for w in report.modes],
    )
    print_summary(
        "verify",
        {
            "A": f"{options.a}, in float64",
            "B": options.b,
            "inputs": ", ".join(report.inputs),
            "first difference": report.difference or "none",
            "notes": "\n".join(report.notes) or "none",
            "verdict": report.verdict,
        },
    )


def _worst(mode: ModeReport) -> tuple[object, str]:
    worst = mode.worst
    return ("", mode.problem) if worst is None else (worst.worst.ratio, worst.name)


def _answer(certificate: Certificate, problems: list[str], options: argparse.Namespace) -> int:
    """Show a certificate; 0: proved, 1: different or not valid, 2: undecided, 3: sampled."""
    again = options.a is None
    if options.json:
        print_json(certificate.to_json() | {"problems": problems})
    else:
        _show_certificate(certificate, problems, options)
    if again and problems:
        return FAILED
    return exit_code(certificate.verdict, allow_sampled=options.allow_sampled)


def _show_certificate(
    certificate: Certificate, problems: list[str], options: argparse.Namespace
) -> None:
    console.print(str(certificate))
    worst = [(s, s.worst) for s in certificate.sites if s.worst is not None]
    worst.sort(key=lambda item: -item[1][1].max_ratio if item[1] else 0.0)
    if worst:
        print_table(
            f"worst {min(5, len(worst))} of {len(worst)} layers",
            ("", "max |ΔW|", "multiple of storage rounding", "‖Δy‖ ≤ · ‖x‖", "float32 ≤ · ‖x‖"),
            [
                (s.name, w[1].max_abs, w[1].max_ratio, w[1].operator, w[1].float32 or "no bound")
                for s, w in worst[:5]
                if w is not None
            ],
        )
    rows: dict[str, object] = {
        "A": certificate.reference.label,
        "B": certificate.candidate.label,
        "verdict": certificate.verdict,
        "for all inputs": certificate.scope,
        "conditions": "\n".join(certificate.conditions) or "none",
        "tokenizer": certificate.tokenizer,
    }
    if options.a is None:
        rows = {name: rows[name] for name in ("A", "B", "verdict", "conditions")}
        rows["certificate"] = "does not hold" if problems else "holds"
        rows["problems"] = "\n".join(problems) or "none"
        rows["not tested again"] = f"{len(certificate.sampled)} parts that were tested on samples"
    elif options.certificate:
        rows["written"] = options.certificate
    print_summary("verify", rows)


def _show(report: Report, options: argparse.Namespace, *, library: bool) -> None:
    worst = sorted(report.sites, key=lambda c: -c.max_rel)[:10]
    columns = ("", "max abs", "max rel", "sqnr dB")
    if worst:
        print_table(
            f"worst {len(worst)} of {len(report.sites)} sites",
            columns,
            [(c.name, c.max_abs, c.max_rel, c.sqnr_db) for c in worst],
        )
    print_table(
        "outputs",
        (*columns, "problem"),
        [(c.name, c.max_abs, c.max_rel, c.sqnr_db, c.problem) for c in report.outputs],
    )
    print_summary(
        "verify",
        {
            "A": options.a,
            "B": options.b,
            "kernels": _kernels((options.a, options.b), used_library=library),
            "inputs": report.inputs,
            "tolerance": report.tolerance,
            "first diverging site": report.first_divergence or "none",
            "verdict": report.verdict,
        },
    )


def _kernels(paths: tuple[str, str], *, used_library: bool) -> str:
    """What an exported model ran on."""
    kinds = [found.kind for found in map(find_artifact, paths) if found is not None]
    if ArtifactKind.OPENVINO in kinds:
        return "of OpenVINO's CPU plugin"
    if ArtifactKind.TORCH in kinds:
        return "of torch"
    if ArtifactKind.COREML in kinds:
        return "none: values that coremltools infers, no Apple device"
    return "with the operator library" if used_library else "of ONNX Runtime"

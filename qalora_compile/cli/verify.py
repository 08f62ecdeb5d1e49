"""`verify`: compare RUN, FOLDED, DIR, .onnx, .gguf: on inputs, node by node, or by proof."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.cli.exit_codes import exit_code
from qalora_compile.cli.ui import (
    console,
    err_console,
    print_json,
    print_summary,
    print_table,
    steps,
)
from qalora_compile.errors import UserInputError
from qalora_compile.files import check_output

if TYPE_CHECKING:  # imported where they are used: a certificate is checked without torch
    from qalora_compile.cli.pooling import Pooling
    from qalora_compile.ir.program import Program
    from qalora_compile.ir.signature import Call
    from qalora_compile.verify.compare import Report
    from qalora_compile.verify.numeric.report import ModeReport, NumericReport
    from qalora_compile.verify.proof.certificate import Certificate
    from qalora_compile.verify.proof.graphs.graph import Graph

NAME = "verify"
SUMMARY = "compare two programs or exported models; exit 0 equal, 1 not equal, 2 not comparable"
EXAMPLES = """examples:
  qalora-compile verify run folded --max-abs 1e-4
  qalora-compile verify folded edge --max-rel 1e-4 --inputs 8
  qalora-compile verify folded edge --max-rel 1e-4 --library     on the fused kernels alone
  qalora-compile verify folded edge/model.onnx --max-abs 1e-3 --json
  qalora-compile verify folded edge/model.gguf --max-rel 1e-2    read back by its own library
  qalora-compile verify folded edge --prove --certificate equal.json
  qalora-compile verify --certificate equal.json                 again later, without torch
  qalora-compile verify folded edge --numeric                    node by node, without a tolerance
  qalora-compile verify folded edge --numeric --html report.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("a", metavar="A", nargs="?", help="RUN, FOLDED, DIR, .onnx or .gguf")
    parser.add_argument("b", metavar="B", nargs="?", help="likewise; one of them RUN or FOLDED")
    parser.add_argument("--max-abs", type=float, metavar="F", help="largest difference admitted")
    parser.add_argument(
        "--max-rel", type=float, metavar="F", help="… as a part of the output scale"
    )
    parser.add_argument("--inputs", type=int, default=4, metavar="N", help="random inputs to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--library", action="store_true", help="run exported models with the operator library alone"
    )
    parser.add_argument(
        "--prove", action="store_true", help="compare every coefficient and the graph around them"
    )
    parser.add_argument(
        "--certificate", metavar="FILE", help="write what was proved; without A and B check FILE"
    )
    parser.add_argument(
        "--numeric",
        action="store_true",
        help="compare along the graph, measured by float64, on odd inputs too, at every "
        "optimization level, with the operator library and without; exit 2: UNDECIDED",
    )
    parser.add_argument(
        "--levels",
        metavar="LIST",
        help="of --numeric: only these of disabled,basic,extended,all",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write a page of it that opens without a server"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.inputs < 1:
        raise UserInputError(f"--inputs is {options.inputs}", hint="use 1 or more")
    if options.a is None and options.certificate:
        if options.html:
            raise UserInputError("checked again, a certificate gives no page", hint="--prove does")
        return _check_again(options)
    if options.a is None or options.b is None:
        raise UserInputError("two things to compare are needed", hint="verify A B --max-rel 1e-4")
    if options.levels and not options.numeric:
        raise UserInputError("--levels belongs to --numeric", hint="add --numeric")
    _check_written(options)
    if options.prove:
        return _prove(options)
    if options.numeric:
        return _numeric(options)
    if options.certificate:
        raise UserInputError("only a proof gives a certificate", hint="add --prove")
    return _compare(options)


def _check_written(options: argparse.Namespace) -> None:
    """Refuse a page or certificate in the place of something else, before the work is done."""
    for file in (options.html, options.certificate):
        if file:
            inputs = [options.a, options.b]
            check_output(Path(file), overwrite=True, inputs=inputs, is_file=True)


def _compare(options: argparse.Namespace) -> int:
    from qalora_compile.ir.program import Program
    from qalora_compile.runtime.library import library_path
    from qalora_compile.verify.compare import Tolerance
    from qalora_compile.verify.equivalence import verify_equivalence
    from qalora_compile.verify.inputs import sample_inputs
    from qalora_compile.verify.numeric.decoding_calls import sequence_calls

    if options.max_abs is None and options.max_rel is None:
        raise UserInputError(
            "no tolerance was given",
            hint="add --max-abs 1e-4 or --max-rel 1e-4, for which there is no default; or --prove "
            "or --numeric, which need none",
        )
    tolerance = Tolerance(max_abs=options.max_abs, max_rel=options.max_rel)
    with steps():
        sides = [_load(options.a), _load(options.b)]
        sides = [_pooled_as(a, b) for a, b in (sides, sides[::-1])]
        program = next((s for s in sides if isinstance(s, Program)), None)
        if program is None:
            raise UserInputError(
                "neither side is a RUN or FOLDED folder, whose signature inputs are made from",
                hint="compare each exported model with its FOLDED folder",
            )
        calls: list[Call] = list(sample_inputs(program, options.inputs, seed=options.seed))
        exported = [_exported(side) for side in sides]
        if any(map(_keeps_cache, exported)):
            calls += sequence_calls(program, seed=options.seed)
        both = not options.library and any(map(_has_own_operators, exported))
        reports = {
            used: verify_equivalence(
                sides[0], sides[1], calls, tolerance, library=library_path() if used else None
            )
            for used in ([False, True] if both else [options.library])
        }
        decisive = next((r for r in reports.values() if not r.passed), reports[min(reports)])
        _write_page(decisive, sides[0], sides[1], options)
    if options.json:
        more = {"with_library": reports[True].to_json()} if both else {}
        print_json(reports[min(reports)].to_json() | more)
    else:
        for used, report in reports.items():
            _show(report, options, library=used)
    return exit_code(decisive.verdict)


def _keeps_cache(graphs: list[Graph]) -> bool:
    """Whether graphs are those of an exported language model with a key-value cache."""
    from qalora_compile.ir.signature import PAST

    return len(graphs) == 1 and any(n.startswith(PAST) for n, _ in graphs[0].inputs.values())


def _has_own_operators(graphs: list[Graph]) -> bool:
    """Whether graphs have operators of the library, which can run here."""
    from qalora_compile.runtime.library import kernel_level
    from qalora_compile.verify.runners.onnx_session import uses_library

    own = any(uses_library(graph.extra) for graph in graphs)
    return own and kernel_level() is not None


def _exported(side: Program | Path) -> list[Graph]:
    """The graphs of an exported model; none where the side is something else."""
    from qalora_compile.verify.proof.graphs.graph import ONNX
    from qalora_compile.verify.proof.open_graph import open_graphs

    graphs = open_graphs(side) if isinstance(side, Path) else ()
    return [graph for graph in graphs if graph.dialect == ONNX]


def _prove(options: argparse.Namespace) -> int:
    from qalora_compile.verify.proof.prove import prove_equivalence

    with steps():
        a, b = Path(options.a), Path(options.b)
        cached = with_cache(a, b)
        certificate = prove_equivalence(
            a if cached is None else cached,
            b,
            samples=options.inputs,
            seed=options.seed,
            folder=a if cached is not None else None,
        )
    if options.certificate:
        certificate.write(options.certificate)
    if options.html:
        _write_page(certificate, cached or _load(options.a), _load(options.b), options)
    return _answer(certificate, [], options)


def _numeric(options: argparse.Namespace) -> int:
    from qalora_compile.runtime.library import kernel_level, library_path
    from qalora_compile.verify.numeric.compare_nodes import compare_nodes, named_inputs
    from qalora_compile.verify.runners.onnx_session import LEVELS

    if options.max_abs is not None or options.max_rel is not None:
        raise UserInputError(
            "--numeric takes no tolerance", hint="leave --max-abs and --max-rel out"
        )
    levels = tuple(LEVELS) if options.levels is None else tuple(options.levels.split(","))
    with steps():
        a, b = Path(options.a), Path(options.b)
        reference = with_cache(a, b) or _load(options.a)
        if isinstance(reference, Path):
            raise UserInputError(
                "A is no program: only a program runs in float64",
                where=options.a,
                hint="give RUN or FOLDED first, then what is compared with it",
            )
        calls = named_inputs(reference, options.inputs, seed=options.seed)
        built = kernel_level() is not None
        library = library_path() if built or options.library else None  # --library: or it is said
        report = compare_nodes(reference, b, calls, levels=levels, library=library)
        _write_page(report, reference, _load(options.b), options)
    if options.json:
        print_json(report.to_json())
    else:
        _show_numeric(report, options)
    return exit_code(report.verdict)


def _write_page(
    outcome: Report | NumericReport | Certificate,
    a: Program | Path,
    b: Program | Path,
    options: argparse.Namespace,
) -> None:
    """The page, where one was asked for."""
    if not options.html:
        return
    from qalora_compile.ir.program import Program
    from qalora_compile.verify.debug.report_page import verify_page

    if not isinstance(a, Program):
        raise UserInputError(
            "a page needs a program as A", where=options.a, hint="give RUN or FOLDED first"
        )
    verify_page(outcome, a, b, title=f"{options.a} → {options.b}").write(options.html)


def _show_numeric(report: NumericReport, options: argparse.Namespace) -> None:
    print_table(
        f"ways of running {options.b}",
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


def _worst(way: ModeReport) -> tuple[object, str]:
    worst = way.worst
    return ("", way.problem) if worst is None else (worst.worst.ratio, worst.name)


def with_cache(folder: Path, model: Path) -> Program | None:
    """The program of `folder` with a key-value cache, where the exported `model` has one.

    It is captured again from the description of the model that the folder holds. An encoder is
    pooled as the record beside the exported model says. None where the program in the folder is
    the one to compare with.
    """
    from qalora_compile.verify.proof.graphs.graph import FX, ONNX
    from qalora_compile.verify.proof.open_graph import open_graph

    sides = open_graph(folder), open_graph(model)
    if (sides[0].dialect, sides[1].dialect) != (FX, ONNX):
        return None
    from qalora_compile.cli.folders import MODEL
    from qalora_compile.ir.program import Program
    from qalora_compile.ir.signature import PAST

    names = [{name for name, _ in side.inputs.values()} for side in sides]
    pooling = _pooling_of(model)
    if pooling.in_graph:
        return pooling.apply(Program.load(folder))
    has_cache = [any(name.startswith(PAST) for name in side) for side in names]
    if has_cache != [False, True] or not (folder / MODEL).is_dir():
        return None
    from qalora_compile.api import add_kv_cache

    logits = next(o for o in sides[1].extra.graph.output if o.name == "logits")
    last = logits.type.tensor_type.shape.dim[1].dim_value == 1
    return add_kv_cache(Program.load(folder), folder / MODEL, last_logits=last)


def _pooled_as(side: Program | Path, other: Program | Path) -> Program | Path:
    """A program with the sentence embedding that the exported model in `other` has."""
    from qalora_compile.ir.program import Program

    if not isinstance(side, Program) or isinstance(other, Program):
        return side
    return _pooling_of(other).apply(side)


def _pooling_of(exported: Path) -> Pooling:
    """The pooling that the record of an exported model says."""
    from qalora_compile.cli.edge import read_edge_record
    from qalora_compile.cli.pooling import recorded_pooling

    folder = exported if exported.is_dir() else exported.parent
    return recorded_pooling(read_edge_record(folder))


def _check_again(options: argparse.Namespace) -> int:
    from qalora_compile.verify.proof.prove import check_certificate

    with steps():
        certificate, problems = check_certificate(options.certificate)
    return _answer(certificate, problems, options)


def _answer(certificate: Certificate, problems: list[str], options: argparse.Namespace) -> int:
    """Show a certificate; 0 equal (and, checked again, as it says), 1 not, 2 undecided."""
    again = options.a is None
    if options.json:
        print_json(certificate.to_json() | {"problems": problems})
    else:
        _show_certificate(certificate, problems, options)
    if again:
        return 1 if problems else 0
    return exit_code(certificate.verdict)


def _show_certificate(
    certificate: Certificate, problems: list[str], options: argparse.Namespace
) -> None:
    console.print(str(certificate))
    worst = [(s, s.worst) for s in certificate.sites if s.worst is not None]
    worst.sort(key=lambda item: -item[1][1].max_ratio if item[1] else 0.0)
    if worst:
        print_table(
            f"worst {min(5, len(worst))} of {len(worst)} layers",
            ("", "max |ΔW|", "of what storing explains", "‖Δy‖ ≤ · ‖x‖", "float32 ≤ · ‖x‖"),
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
        "for all inputs": "yes" if certificate.proved else "no: see what was tried on samples",
    }
    if options.a is None:
        rows = {name: rows[name] for name in ("A", "B")}
        rows["certificate"] = "does not hold" if problems else "holds"
        rows["problems"] = "\n".join(problems) or "none"
        rows["not tried again"] = f"{len(certificate.sampled)} parts that were tried on samples"
    elif options.certificate:
        rows["written"] = options.certificate
    print_summary("verify", rows)


def _load(text: str) -> Program | Path:
    from qalora_compile.ir.program import Program
    from qalora_compile.untrusted.artifacts import PROGRAM_FILE

    path = Path(text)
    if (path / PROGRAM_FILE).exists():
        return Program.load(path)
    weights = _checkpoint(path)
    return path if weights is None else _read_back(weights)


def _checkpoint(path: Path) -> Path | None:
    """The GGUF file or folder of weights that a path names; None where it names something else."""
    from qalora_compile.cli.checkpoint import GGUF_FILE

    if path.suffix == ".gguf":
        return path
    if (path / GGUF_FILE).is_file():
        return path / GGUF_FILE
    return path if any(path.glob("*.safetensors")) else None


def _read_back(path: Path) -> Program:
    """A checkpoint as a model, by its format's own library; every linear map with its own row."""
    from qalora_compile.capture.load_source import load_source
    from qalora_compile.passes.annotate_linears import AnnotateLinears
    from qalora_compile.passes.canonicalize.canonical_passes import canonical_passes
    from qalora_compile.passes.framework.pipeline import Pipeline
    from qalora_compile.verify.runners.reference_libraries import put_library_weights_

    source = load_source(str(path))
    reader = "gguf" if path.is_file() else put_library_weights_(source.model, path)
    err_console.print(f"note: {path} is read back by {reader}")
    captured = source.capture()
    return Pipeline([*canonical_passes(), AnnotateLinears()])(captured).program


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
            "kernels": "with the operator library" if library else "of ONNX Runtime",
            "inputs": report.inputs,
            "tolerance": report.tolerance,
            "first diverging site": report.first_divergence or "none",
            "verdict": report.verdict,
        },
    )

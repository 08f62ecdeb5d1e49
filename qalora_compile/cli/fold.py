"""`fold`: fold the trained adapters of a RUN into its offsets; writes a FOLDED folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from qalora_compile.api import fold_adapters
from qalora_compile.cli.folders import copy_parts, load_run, write_run_file
from qalora_compile.cli.ui import console, print_summary, steps
from qalora_compile.errors import VerificationError
from qalora_compile.files import atomic_folder, reserve
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.storage import write_program
from qalora_compile.verify.compare import Report, Tolerance, worst_of
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs

NAME = "fold"
SUMMARY = "fold the trained adapters of a RUN into its zero-points, and check that nothing changed"
EXAMPLES = """examples:
  qalora-compile fold run --out folded
  qalora-compile fold run --out folded --overwrite
"""
_TOLERANCE = Tolerance(max_rel=1e-4, rounding=True)
_FAILED = ".failed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="RUN", help="folder written by finetune")
    parser.add_argument("--out", required=True, metavar="FOLDED", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FOLDED")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    source, out = Path(options.folder), Path(options.out)
    with reserve(out, overwrite=options.overwrite, inputs=[source]), steps():
        program, record = load_run(source)
        check_program(program)
        folded = fold_adapters(program)
        check_program(folded)
        report = verify_equivalence(program, folded, sample_inputs(folded, 2), _TOLERANCE)
        place = out if report.passed else out.with_name(out.name + _FAILED)
        with atomic_folder(place, overwrite=options.overwrite or not report.passed) as folder:
            write_program(folded, folder)
            copy_parts(source, folder)
            kept = ("model", "quant", "embeddings", "adapter", "reading", "status", "step", "ends")
            verified = {"fold": report.summary()}
            write_run_file(
                folder, {k: record[k] for k in kept if k in record} | {"verified": verified}
            )
    if not report.passed:
        raise _refused(report, place)
    if record.get("status") != "finished":
        console.print(f"note: the run is {record.get('status')} at step {record.get('step')}")
    print_summary(
        "fold",
        {
            "layers folded": len(folded.plan.to_quantize()),
            "largest difference, program and folded": f"{report.max_abs:.3g}",
            "as a part of the output scale": f"{max(c.max_rel for c in report.outputs):.3g}",
            "times what rounding alone does": f"{worst_of(report.outputs).rounding or 0:.3g}",
            "written": str(out),
            "next": f"qalora-compile export {out} --out EDGE",
        },
    )
    return 0


def _refused(report: Report, place: Path) -> VerificationError:
    """The failed check, with the name of the folder in which the result is kept."""
    worst = worst_of(report.outputs)
    return VerificationError(
        f"the folded program differs from the trained one by {worst.max_abs:.3g}, "
        f"{worst.rounding or 0:.3g} times what rounding does to the trained one",
        report=report,
        where=f"first diverging site: {report.first_divergence}",
        hint="this is a fault of the fold, not of your training: please report it; the result is "
        f"kept in {place}",
    )

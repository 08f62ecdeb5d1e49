"""`fold`: fold the trained adapters of a RUN into its zero-points; writes a FOLDED folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from qalora_compile.cli.options import command_line, spec_of
from qalora_compile.cli.ui import console, print_summary, steps

EXAMPLES = """examples:
  qalora-compile fold run --out folded
  qalora-compile fold run --out folded --overwrite
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="RUN", help="folder written by finetune")
    parser.add_argument("--out", required=True, metavar="FOLDED", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FOLDED")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.fold import FoldSpec, fold_run
    from qalora_compile.verify.compare import worst_of

    spec = spec_of(FoldSpec, options, folder=Path(options.folder), out=Path(options.out))
    with steps():
        result = fold_run(spec)
    if result.status != "finished":
        console.print(f"note: the run is {result.status} at step {result.step}")
    report = result.report
    print_summary(
        "fold",
        {
            "layers folded": len(result.program.plan.to_quantize()),
            "largest difference, program and folded": f"{report.max_abs:.3g}",
            "as a fraction of the output scale": f"{max(c.max_rel for c in report.outputs):.3g}",
            "as a multiple of its rounding error": f"{worst_of(report.outputs).rounding or 0:.3g}",
            "written": str(spec.out),
            "next": command_line("export", spec.out, "--out", "EDGE"),
        },
    )
    return 0

"""`verify`: compare two of RUN, FOLDED, DIR and .onnx on random inputs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qalora_compile.cli.ui import console, print_summary, print_table, steps
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import PROGRAM_FILE
from qalora_compile.runtime.library import library_path
from qalora_compile.verify.compare import Report, Tolerance
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs

NAME = "verify"
SUMMARY = "compare two programs or exported models; exit 0 equal, 1 not equal, 2 not comparable"
EXAMPLES = """examples:
  qalora-compile verify run folded --max-abs 1e-4
  qalora-compile verify folded edge --max-rel 1e-4 --inputs 8
  qalora-compile verify folded edge --max-rel 1e-4 --library     on the fused kernels
  qalora-compile verify folded edge/model.onnx --max-abs 1e-3 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("a", metavar="A", help="RUN, FOLDED, DIR or .onnx")
    parser.add_argument("b", metavar="B", help="likewise; at least one of them RUN or FOLDED")
    parser.add_argument("--max-abs", type=float, metavar="F", help="largest difference admitted")
    parser.add_argument(
        "--max-rel", type=float, metavar="F", help="… as a part of the output scale"
    )
    parser.add_argument("--inputs", type=int, default=4, metavar="N", help="random inputs to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--library", action="store_true", help="run exported models with the operator library"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.inputs < 1:
        raise UserInputError(f"--inputs is {options.inputs}", hint="use 1 or more")
    if options.max_abs is None and options.max_rel is None:
        raise UserInputError(
            "no tolerance was given",
            hint="add --max-abs 1e-4 or --max-rel 1e-4: there is no default",
        )
    tolerance = Tolerance(max_abs=options.max_abs, max_rel=options.max_rel)
    with steps():
        sides = [_load(options.a), _load(options.b)]
        program = next((s for s in sides if isinstance(s, Program)), None)
        if program is None:
            raise UserInputError(
                "neither side is a RUN or FOLDED folder, whose signature inputs are made from",
                hint="compare each exported model with its FOLDED folder",
            )
        calls = sample_inputs(program, options.inputs, seed=options.seed)
        library = library_path() if options.library else None
        report = verify_equivalence(sides[0], sides[1], calls, tolerance, library=library)
    if options.json:
        console.print_json(json.dumps(report.to_json()))
    else:
        _show(report, options)
    return 0 if report.passed else 1


def _load(text: str) -> Program | Path:
    path = Path(text)
    return Program.load(path) if (path / PROGRAM_FILE).exists() else path


def _show(report: Report, options: argparse.Namespace) -> None:
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
            "kernels": "with the operator library" if options.library else "of ONNX Runtime",
            "inputs": report.inputs,
            "tolerance": report.tolerance,
            "first diverging site": report.first_divergence or "none",
            "verdict": report.verdict,
        },
    )

"""`bench`: speed and memory of an exported language model, next to its other forms."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.brief import megabytes
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import print_json, print_table, steps

if TYPE_CHECKING:
    from qalora_compile.api.bench import Result

EXAMPLES = """examples:
  # merged: operator library and stock kernels
  qalora-compile bench edge
  # also with adapters unmerged, and in float32
  qalora-compile bench edge --run run
  qalora-compile bench edge --prompts 16 --decode 16 --rounds 3

All forms alternate in one process; the memory of each is measured in a
separate process.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="DIR", help="folder written by export")
    parser.add_argument(
        "--run", dest="trained", metavar="RUN", help="its RUN, for the unmerged and float forms"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=[16, 128, 512],
        metavar="T",
        help="lengths of the prompts",
    )
    parser.add_argument("--decode", type=int, default=16, metavar="N", help="new tokens per prompt")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="repetitions, of which the median counts"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: its own choice)"
    )
    parser.add_argument(
        "--card", action="store_true", help="write the speeds into the model card of DIR"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.bench import BenchSpec, bench
    from qalora_compile.api.edge import read_edge_record
    from qalora_compile.api.model_card import add_findings

    trained = Path(options.trained) if options.trained else None
    spec = spec_of(BenchSpec, options, folder=Path(options.folder), run=trained)
    with steps():
        results = bench(spec)
    if options.card:
        add_findings(spec.folder, read_edge_record(spec.folder), speeds=_speeds(results))
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        _show(results)
    return 0


def _speeds(results: Sequence[Result]) -> list[dict[str, str]]:
    """The rows of a model card."""
    from qalora_compile.runtime.doctor import cpu_name

    return [
        {
            "form": result.form,
            **{f"prompt of {n}, tokens/s": f"{v:.0f}" for n, v in sorted(result.prompts.items())},
            "after it, tokens/s": f"{result.decode:.1f}",
            "memory": megabytes(result.memory),
            "machine": cpu_name(),
        }
        for result in results
    ]


def _show(results: Sequence[Result]) -> None:
    """Print one table, with ratios to the last form: the float one if a RUN is given."""
    lengths = sorted(results[0].prompts)
    columns = (
        "form",
        *(f"prompt {n}" for n in lengths),
        "after it",
        "ratio",
        f"first of {lengths[-1]}",
        "memory",
        "file",
    )
    last = results[-1].decode
    print_table(
        "bench: tokens per second of a prompt and after it, and the time to the first token",
        columns,
        [
            (
                result.form,
                *(f"{result.prompts[n]:.0f}" for n in lengths),
                f"{result.decode:.1f}",
                f"{result.decode / last:.2f}×",
                f"{result.first_token:.3f} s",
                megabytes(result.memory),
                megabytes(result.size),
            )
            for result in results
        ],
    )

"""`bisect`: run a pipeline pass by pass and find the first that changes what is computed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.cli.exit_codes import exit_code
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import print_json, print_summary, steps
from qalora_compile.config import GRAPH_TARGETS

if TYPE_CHECKING:
    from qalora_compile.verify.debug.bisect import Culprit, Step

EXAMPLES = """examples:
  qalora-compile bisect run --target ort-stock --out found
  qalora-compile bisect folded --passes "legalize-ort,share-group-sums" \\
    --out found
  qalora-compile bisect package.module:factory \\
    --passes "annotate-linears,quantize-groups"
  # the minimal reproduction: two programs that differ
  python found/repro.py
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="PATH", help="RUN, FOLDED or MODEL")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--passes", metavar="TEXT", help="the pipeline, as text")
    chosen.add_argument(
        "--target",
        help=f"all passes up to this target, as export runs them: {', '.join(GRAPH_TARGETS)}",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for a minimal reproduction")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    parser.add_argument("--inputs", type=int, default=2, metavar="N", help="random inputs to try")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.bisect import BisectSpec, bisect_pipeline

    spec = spec_of(BisectSpec, options, out=Path(options.out) if options.out else None)
    with steps():
        result = bisect_pipeline(spec)
    if options.json:
        print_json(_to_json(result.culprit, result.steps))
    else:
        _show(result.culprit, result.steps, spec.out)
    return exit_code(result.verdict)


def _to_json(culprit: Culprit | None, done: Sequence[Step]) -> dict[str, object]:
    found = None
    if culprit is not None:
        found = {
            "step": culprit.index,
            "pass": culprit.step,
            "site": culprit.site,
            "value": None if culprit.row is None else culprit.row.name,
            "nodes": [] if culprit.row is None else list(culprit.row.lines),
            "cumulative": culprit.cumulative,
            "report": culprit.report.to_json(),
        }
    return {"passes": [step.name for step in done], "culprit": found}


def _show(culprit: Culprit | None, done: Sequence[Step], out: Path | None) -> None:
    rows: dict[str, object] = {"passes": "\n".join(step.name for step in done)}
    lossy = [step.name for step in done if step.lossy]
    if lossy:
        rows["not judged, since they round"] = "\n".join(lossy)
    if culprit is None:
        rows["found"] = "every pass preserves what the program computes"
    else:
        rows["found"] = str(culprit)
        rows["pass"], rows["site"] = culprit.step, culprit.site or "none"
        if out:
            rows["reproduction"] = f"python {out / 'repro.py'}"
    print_summary("bisect", rows)

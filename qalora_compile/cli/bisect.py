"""`bisect`: run a pipeline step by step and name the first pass that changes what is computed."""

from __future__ import annotations

import argparse
from pathlib import Path

from qalora_compile.api import lowering
from qalora_compile.capture.load_source import load_source
from qalora_compile.cli.ui import print_json, print_summary, steps
from qalora_compile.config import ONNX_TARGETS, ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.files import check_output
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTED, FOLDED, QUANTIZED
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.passes.framework.base import Pass, PassResult, validating
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.untrusted.artifacts import PROGRAM_FILE
from qalora_compile.verify.debug.bisect import Culprit, Step, bisect
from qalora_compile.verify.debug.write_repro import write_repro
from qalora_compile.verify.numeric.compare_nodes import named_inputs

NAME = "bisect"
SUMMARY = "name the first pass, site and node that changes what a program computes"
EXAMPLES = """examples:
  qalora-compile bisect run --target ort-stock --out found
  qalora-compile bisect folded --passes "legalize-ort,share-group-sums" --out found
  qalora-compile bisect package.module:factory --passes "annotate-linears,quantize-groups"
  python found/repro.py                     what is left of it: two small programs that differ
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="PATH", help="RUN, FOLDED or MODEL")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--passes", metavar="TEXT", help="the pipeline, as text")
    chosen.add_argument(
        "--target",
        help=f"all passes up to this target, as export runs them: {', '.join(ONNX_TARGETS)}",
    )
    parser.add_argument("--out", metavar="DIR", help="write a minimal reproduction")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    parser.add_argument("--inputs", type=int, default=2, metavar="N", help="random inputs to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.inputs < 1:
        raise UserInputError(f"--inputs is {options.inputs}", hint="use 1 or more")
    if options.out:
        out = Path(options.out)
        check_output(out, overwrite=options.overwrite, inputs=[options.path])
    with steps():
        start = _load(options.path)
        done = _run_passes(start, _passes(start, options))
        calls = named_inputs(start, options.inputs, seed=options.seed)
        culprit = bisect(start, done, calls)
        if culprit is not None and options.out:
            write_repro(culprit, options.out, overwrite=options.overwrite)
    if options.json:
        print_json(_to_json(culprit, done))
    else:
        _show(culprit, done, options)
    return 0 if culprit is None else 1


def _load(text: str) -> Program:
    path = Path(text)
    if (path / PROGRAM_FILE).exists():
        return Program.load(path)
    return load_source(text).capture()


def _passes(start: Program, options: argparse.Namespace) -> list[Pass]:
    if options.passes:
        return list(Pipeline.parse(options.passes).passes)
    if options.target not in ONNX_TARGETS:
        raise UserInputError(
            f"no pass is run for the target {options.target}: only ONNX targets are lowered to",
            where="--target",
            hint=f"use one of {', '.join(ONNX_TARGETS)}; a checkpoint is compared by "
            "qalora-compile verify FOLDED CHECKPOINT --max-rel",
        )
    if start.stage not in (QUANTIZED, ADAPTED, FOLDED):
        raise UserInputError(
            f"a program at stage {start.stage} cannot be lowered",
            hint="--passes names a pipeline from that stage on",
        )
    spec = ExportSpec(target=options.target)
    if start.stage != ADAPTED:
        return lowering(start, spec)
    fold = FoldAdapters()
    return [fold, *lowering(fold(start).program, spec)]


def _run_passes(start: Program, passes: list[Pass]) -> list[Step]:
    """Every pass by itself; programs are checked against their stage around it."""
    done: list[Step] = []

    def keep(step: Pass, result: PassResult) -> None:
        done.append(Step(str(step), result.program, step.lossy))

    with validating():
        Pipeline(passes)(start, keep)
    return done


def _to_json(culprit: Culprit | None, done: list[Step]) -> dict[str, object]:
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


def _show(culprit: Culprit | None, done: list[Step], options: argparse.Namespace) -> None:
    rows: dict[str, object] = {"passes": "\n".join(step.name for step in done)}
    lossy = [step.name for step in done if step.lossy]
    if lossy:
        rows["not judged, since they round"] = "\n".join(lossy)
    if culprit is None:
        rows["found"] = "every pass keeps what the program computes"
    else:
        rows["found"] = str(culprit)
        rows["pass"], rows["site"] = culprit.step, culprit.site or "none"
        if options.out:
            rows["reproduction"] = f"python {Path(options.out) / 'repro.py'}"
    print_summary("bisect", rows)

"""`bisect_pipeline`: run a pipeline pass by pass and find the first that changes a result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora_compile.api.export import lowering
from qalora_compile.capture.load_source import load_source
from qalora_compile.config import GRAPH_TARGETS, ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.files import check_output
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTED, FOLDED, QUANTIZED
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.passes.framework.base import Pass, PassResult, validating
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.untrusted.artifacts import PROGRAM_FILE
from qalora_compile.verdict import Verdict
from qalora_compile.verify.debug.bisect import Culprit, Step, bisect
from qalora_compile.verify.debug.write_repro import write_repro
from qalora_compile.verify.numeric.compare_nodes import named_inputs


@dataclass(frozen=True, kw_only=True)
class BisectSpec:
    """A pipeline and the program it starts from.

    Attributes:
        path: A RUN or FOLDED folder, or a model.
        passes: The pipeline as text; None takes all passes up to `target`.
        target: An ONNX target.
        out: Folder for a minimal reproduction; None writes none.
        overwrite: Replace an existing folder.
        inputs: Number of random inputs to try.
        seed: Seed of the random inputs.
    """

    path: str
    passes: str | None = None
    target: str | None = None
    out: Path | None = None
    overwrite: bool = False
    inputs: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.inputs < 1:
            raise UserInputError(f"--inputs is {self.inputs}", hint="use 1 or more")
        if (self.passes is None) == (self.target is None):
            raise UserInputError("one of passes and target is needed", hint="target='ort'")


@dataclass(frozen=True, kw_only=True)
class BisectResult:
    """The result of `bisect_pipeline`.

    Attributes:
        steps: The program after each pass, in order.
        culprit: The first pass that changes the result; None if every pass preserves it.
    """

    steps: tuple[Step, ...]
    culprit: Culprit | None

    @property
    def verdict(self) -> Verdict:
        """Equal if every pass preserves what is computed."""
        return Verdict.of(self.culprit is None)


def bisect_pipeline(spec: BisectSpec) -> BisectResult:
    """Run the passes one by one and compare each result with the pass's input.

    Raises:
        UserInputError: the path cannot be read, no pass is named, or the output exists.
        PassError: a pass refuses its input program.
    """
    if spec.out is not None:
        check_output(spec.out, overwrite=spec.overwrite, inputs=[spec.path])
    start = _load(spec.path)
    steps = _run_passes(start, _passes(start, spec))
    culprit = bisect(start, steps, named_inputs(start, spec.inputs, seed=spec.seed))
    if culprit is not None and spec.out is not None:
        write_repro(culprit, spec.out, overwrite=spec.overwrite)
    return BisectResult(steps=tuple(steps), culprit=culprit)


def _load(text: str) -> Program:
    path = Path(text)
    if (path / PROGRAM_FILE).exists():
        return Program.load(path)
    return load_source(text).capture()


def _passes(start: Program, spec: BisectSpec) -> list[Pass]:
    if spec.passes:
        return list(Pipeline.parse(spec.passes).passes)
    if spec.target not in GRAPH_TARGETS:
        raise UserInputError(
            f"no passes run for the target {spec.target}: only graphs are lowered",
            where="--target",
            hint=f"use one of {', '.join(GRAPH_TARGETS)}; compare a checkpoint with "
            "qalora-compile verify FOLDED CHECKPOINT --max-rel",
        )
    if start.stage not in (QUANTIZED, ADAPTED, FOLDED):
        raise UserInputError(
            f"a program at stage {start.stage} cannot be lowered",
            hint="give a pipeline that starts at that stage with --passes",
        )
    target = ExportSpec(target=str(spec.target))
    if start.stage != ADAPTED:
        return lowering(start, target)
    fold = FoldAdapters()
    return [fold, *lowering(fold(start).program, target)]


def _run_passes(start: Program, passes: list[Pass]) -> list[Step]:
    """Run every pass and validate its input and output against their stages."""
    done: list[Step] = []

    def keep(step: Pass, result: PassResult) -> None:
        done.append(Step(str(step), result.program, step.lossy))

    with validating():
        Pipeline(passes)(start, keep)
    return done

"""Lower a program for a target and export it to files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qalora_compile.config import AUTO, FUSION_OPSETS, ExportSpec
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.targets import LoweredTarget, get_target
from qalora_compile.files import check_output
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTED, ANNOTATED, FLOAT, LEGALIZED
from qalora_compile.passes.analysis.parameter_rounding import (
    ParameterRounding,
    parameter_rounding,
)
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.fusions.fuse_attention import FuseAttention
from qalora_compile.passes.fusions.fuse_multi_head import FuseMultiHead
from qalora_compile.passes.fusions.fuse_rms_norm import FuseRmsNorm
from qalora_compile.passes.fusions.fuse_rotary import FuseRotary
from qalora_compile.passes.fusions.fuse_shared_input import FuseSharedInput
from qalora_compile.passes.fusions.fuse_skip_norm import FuseSkipNorm
from qalora_compile.passes.legalize.widen_halves import WidenHalves, needs_widening

if TYPE_CHECKING:
    from torch import nn


_FUSING = (FuseRmsNorm, FuseRotary, FuseAttention, FuseSkipNorm, FuseMultiHead)
_NOT_FUSED = "not fused: "


def lower(program: Program, spec: ExportSpec) -> Program:
    """Rewrite a program for the target of `spec`; half-precision programs compute in float32.

    The program's notes list what the fusions of `spec` did not match, and why.

    Raises:
        PreconditionError: adapters are not folded (or nothing is quantized) and the specification
            does not allow that.
        UserInputError: a tensor holds NaN or infinite values.
    """
    check_program(program)
    steps = lowering(program, decide_parameters(program, spec))
    if not steps:
        return program
    found: list[tuple[Pass, PassResult]] = []
    lowered = Pipeline(steps)(program, lambda step, result: found.append((step, result))).program
    fused = [(step, result) for step, result in found if isinstance(step, _FUSING)]
    return dataclasses.replace(lowered, notes=(*lowered.notes, *_not_fused(fused)))


def _not_fused(found: Sequence[tuple[Pass, PassResult]]) -> list[str]:
    """A note for each reason why a fusion did not match, with the first such node."""
    notes = []
    for step, result in found:
        alike: dict[str, list[Change]] = {}
        for skip in result.skips:
            alike.setdefault(skip.why, []).append(skip)
        notes += [
            f"{_NOT_FUSED}{step.name} left {same[0].path} ({len(same)} in all): {why}, "
            f"at {same[0].at}"
            for why, same in alike.items()
        ]
    if found and not notes and not any(result.modified for _, result in found):
        names = ", ".join(step.name for step, _ in found)
        notes.append(f"{_NOT_FUSED}{names} found nothing that is written out")
    return notes


def lowering(program: Program, spec: ExportSpec) -> list[Pass]:
    """The passes of `lower`, in order; none if the program is already lowered.

    Raises:
        PreconditionError: see `lower`.
    """
    if program.stage.startswith(LEGALIZED):
        if program.stage != f"{LEGALIZED}{spec.target}":
            raise PreconditionError(
                f"the program is lowered for another target ({program.stage})",
                hint="export the folded program instead",
            )
        return []
    _require_complete(program, spec)
    steps: list[Pass] = [WidenHalves()] if needs_widening(program) else []
    if program.stage not in (FLOAT, ANNOTATED):
        steps += Pipeline.parse(_lowered_target(spec).lowering(program, spec)).passes
    if spec.fusion in ("standard", "ort"):
        steps += [FuseRmsNorm(), FuseRotary(), FuseAttention()]
    if spec.fusion == "ort":
        steps += [FuseSkipNorm(), FuseMultiHead()]
    on_codes = program.stage not in (FLOAT, ANNOTATED)
    if spec.fusion in ("standard", "ort") and spec.target == "ort" and on_codes:
        steps += [FuseSharedInput()]
    return steps


def _require_complete(program: Program, spec: ExportSpec) -> None:
    """Refuse a program that is not on the CPU, not quantized, or has unfolded adapters.

    Raises:
        PreconditionError: it is one of these, and the specification does not allow it.
    """
    device = next((t.device for t in program.tensors().values() if t.device.type != "cpu"), None)
    if device is not None:
        raise PreconditionError(
            f"the program is on {device}, and files are written from the CPU",
            hint='program.to("cpu")',
        )
    if program.stage not in (FLOAT, ANNOTATED, ADAPTED) or spec.allow_unfolded:
        return
    problem, command = (
        ("its adapters are not folded", "fold first: qc.fold_adapters(program), or `fold RUN`")
        if program.stage == ADAPTED
        else ("it is not quantized", "quantize first: qc.quantize_groups(program)")
    )
    as_it_is = (
        ""
        if spec.is_checkpoint
        else ("; or export it as it is with allow_unfolded=True (--allow-unfolded)")
    )
    raise PreconditionError(
        f"the program cannot be exported as it is: {problem}", hint=f"{command}{as_it_is}"
    )


def complete_spec(program: Program, spec: ExportSpec) -> ExportSpec:
    """`spec` with its open fields decided for `program`.

    Args:
        program: As `lower` takes it.
        spec: Its `fusion` may be None, and its `parameter_dtype` `"auto"`.
    """
    spec = decide_parameters(program, spec)
    if spec.fusion is not None or not spec.is_onnx:
        return spec
    fusion = "none"
    if program.signature.cache:
        newest = max(FUSION_OPSETS.values()) if spec.release is None else spec.release.opset
        opset = spec.opset or newest
        choices = ("standard",) if spec.target == "onnx" else ("standard", "ort")  # faster first
        fusion = next((c for c in choices if FUSION_OPSETS[c] <= opset), "none")
    return dataclasses.replace(spec, fusion=fusion)


def decide_parameters(program: Program, spec: ExportSpec) -> ExportSpec:
    """`spec` with a `parameter_dtype` of `"auto"` decided: float16 if no weight moves by it."""
    if spec.parameter_dtype != AUTO:
        return spec
    return with_parameters(spec, parameter_rounding(program, torch.float16))


def with_parameters(spec: ExportSpec, half: ParameterRounding | None) -> ExportSpec:
    """`decide_parameters` for what float16 moves; None if that was not measured."""
    if spec.parameter_dtype != AUTO:
        return spec
    dtype = "float16" if half is not None and half.negligible else "float32"
    return dataclasses.replace(spec, parameter_dtype=dtype)


def _lowered_target(spec: ExportSpec) -> LoweredTarget:
    """The target of a specification that is not for a checkpoint."""
    target = get_target(spec.target)
    if not isinstance(target, LoweredTarget):
        raise UnsupportedError(
            f"no pass lowers a program to target {spec.target}",
            hint="it is a checkpoint: export the folded program",
        )
    return target


def export_model(
    program: Program,
    path: str | Path,
    spec: ExportSpec | None = None,
    *,
    resume: str | None = None,
    model: nn.Module | str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> ExportReport:
    """Write a folded (or quantized) program as one ONNX file, or as another library's checkpoint.

    Args:
        program: Folded, or quantized without adapters.
        path: The `.onnx` file, whose weights may go to `<name>_data` next to it; or the `.ort` file
            with format `"ort"`. For target `"gguf"` a `.gguf` file, for other checkpoints a folder.
        spec: Target and options; None takes target `ort`.
        resume: A short key of everything that determines the file. An interrupted export with the
            same key is resumed. For ONNX files only.
        model: For checkpoints: the transformers model that the program was made from, its folder
            (`config.json`), or its `.gguf` file. Its weights are not read. Targets `"float"` and
            `"safetensors"` do without, and then write no `config.json`.
        tokenizer: For checkpoints: folder with the tokenizer's files; `model`'s by default.

    Raises:
        UserInputError: the path exists and may not be replaced (see `files.check_output`), its
            name does not fit the target, a value is beyond the format, or a tensor holds NaN or
            infinite values.
        OutputError: it cannot be written.
        PreconditionError: see `lower`.
        UnsupportedError: an operator, dtype or property has no form in the target.
    """
    spec, path = spec or ExportSpec(), Path(path)
    if spec.is_checkpoint:
        if resume is not None:
            raise UserInputError(f"resume is given for target {spec.target}", hint="leave it out")
        return _export_checkpoint(program, path, spec, model, tokenizer)
    if model is not None or tokenizer is not None:
        raise UserInputError(
            f"model and tokenizer are given for target {spec.target}",
            hint="only checkpoints hold them: leave them out",
        )
    target = _lowered_target(spec)
    target.check_path(path, spec)
    is_file = spec.is_graph and not target.writes_folder
    check_output(path, overwrite=spec.overwrite, is_file=is_file)
    spec = complete_spec(program, spec)
    lowered = lower(program, spec)
    report = target.export(lowered, path, spec, resume=resume)
    notes = tuple(note for note in lowered.notes if note.startswith(_NOT_FUSED))
    return dataclasses.replace(report, notes=(*report.notes, *notes))


def _export_checkpoint(
    program: Program,
    path: Path,
    spec: ExportSpec,
    model: nn.Module | str | Path | None,
    tokenizer: str | Path | None,
) -> ExportReport:
    from qalora_compile.capture.describe_model import describe
    from qalora_compile.exporters.checkpoints.registry import (
        check_path,
        get_format,
        write_checkpoint,
    )

    check_path(path, spec)
    inputs = [entry for entry in (model, tokenizer) if isinstance(entry, (str, Path))]
    is_file = bool(get_format(spec.target).suffix)
    check_output(path, overwrite=spec.overwrite, inputs=inputs, is_file=is_file)
    _require_complete(program, spec)
    check_program(program)
    if model is None and tokenizer is not None:
        raise UserInputError("a tokenizer is given without a model", hint="give model=…")
    description = None if model is None else describe(model, tokenizer=tokenizer)
    return write_checkpoint(program, path, spec, description)

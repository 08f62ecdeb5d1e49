"""The steps as plain functions, in the order a user takes them; each runs a short pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.config import FUSION_OPSETS, AdapterSpec, ExportSpec, QuantSpec
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.exporters.base import ExportReport
from qalora_compile.files import check_output
from qalora_compile.ir.program import ADAPTED, ANNOTATED, FLOAT, LEGALIZED, Program
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.base import Pass
from qalora_compile.passes.canonicalize_pointwise import CanonicalizePointwise
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.passes.fuse_attention import FuseAttention
from qalora_compile.passes.fuse_multi_head import FuseMultiHead
from qalora_compile.passes.fuse_rms_norm import FuseRmsNorm
from qalora_compile.passes.fuse_rotary import FuseRotary
from qalora_compile.passes.fuse_skip_norm import FuseSkipNorm
from qalora_compile.passes.insert_adapters import InsertAdapters
from qalora_compile.passes.legalize_onnx import LegalizeOnnx
from qalora_compile.passes.legalize_ort import LegalizeOrt
from qalora_compile.passes.legalize_ort_stock import LegalizeOrtStock
from qalora_compile.passes.pipeline import Pipeline
from qalora_compile.passes.quantize_groups import QuantizeGroups
from qalora_compile.passes.replay import replay
from qalora_compile.passes.select import ALL_LINEAR, as_patterns
from qalora_compile.passes.share_group_sums import ShareGroupSums
from qalora_compile.passes.widen_halves import WidenHalves, needs_widening

if TYPE_CHECKING:
    from torch import nn


def quantize_groups(
    program: Program,
    spec: QuantSpec | None = None,
    *,
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: Iterable[str] = (),
) -> Program:
    """Decide which linear layers to quantize, and quantize them.

    Args:
        program: At stage `float`, or `annotated` (its plan is then used as it is).
        spec: Bits, group size and method; None takes 4 bits in groups of 32, min-max.
        targets: `"all-linear"`, or names, dotted suffixes, globs or `re:` patterns. A site that is
            named is quantized even where the default keeps it (a head tied to the embedding).
        exclude: Patterns of layers to keep in float.

    Raises:
        UserInputError: a pattern matches nothing, a weight is not finite, or nothing is left to
            quantize.
        PreconditionError: the program is at another stage.
    """
    quantize = QuantizeGroups(**(spec or QuantSpec()).to_json())
    steps = [] if program.stage == ANNOTATED else _annotation(targets, exclude)
    return Pipeline([*steps, quantize])(program).program


def _annotation(targets: str | Iterable[str], exclude: Iterable[str]) -> list[Pass]:
    """The passes that take a float program to stage `annotated`."""
    wanted = targets if isinstance(targets, str) else as_patterns(list(targets), "targets")
    barred = as_patterns(exclude if isinstance(exclude, str) else list(exclude), "exclude")
    return [CanonicalizePointwise(), AnnotateLinears(targets=wanted, exclude=barred)]


def insert_adapters(program: Program, spec: AdapterSpec | None = None) -> Program:
    """Put a trainable pooled adapter beside every quantized layer; the function stays the same.

    Raises:
        PreconditionError: the program is not at stage `quantized`, or the adapter's group size is
            no multiple of the quantization group.
    """
    insert = InsertAdapters(**(spec or AdapterSpec()).to_json())
    return Pipeline([insert, ShareGroupSums()])(program).program


def adapt_module_(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    quant: QuantSpec | None = None,
    adapter: AdapterSpec | None = None,
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: Iterable[str] = (),
    dynamic_shapes: Any = None,
) -> Program:
    """Quantize and adapt a model in place, module by module, by the plan of its captured graph.

    For code that needs the model itself: `generate()`, `labels`, gradient checkpointing, the
    Hugging Face Trainer. Linear layers become `AdaptedLinear`; where only a weight can be replaced
    (packed attention, 1×1 convolutions, experts) it is parametrized. All else is frozen.

    The returned program has the model's very tensors, under the same names: train the model, then
    `fold_adapters(program)` and export. Before it returns, program and model are run with random
    adapters and compared.

    Args:
        model: The model; a quantized weight that no module reads in float is let go.
        args: Example positional arguments, as for `capture_model`.
        kwargs: Example keyword arguments.
        quant: As for `quantize_groups`.
        adapter: As for `insert_adapters`.
        targets: As for `quantize_groups`.
        exclude: As for `quantize_groups`.
        dynamic_shapes: As for `capture_model`.

    Raises:
        CaptureError: `torch.export` refused the model, or captured something else than it computes.
        UnsupportedError: a module cannot hold its quantized weight.
        VerificationError: model and program differ, for example because the model has a path
            around an adapter.
        UserInputError: as for `quantize_groups` and `insert_adapters`.

    After an error the model is as it was.
    """
    from qalora_compile.capture.model import capture_model
    from qalora_compile.eager.apply import Undo, apply_adapters, share_tensors
    from qalora_compile.eager.check import Agreement, cross_check

    args, kwargs = tuple(args), dict(kwargs or {})
    captured = capture_model(model, args, kwargs, dynamic_shapes)
    agreement = Agreement.find(captured, model, args, kwargs)
    annotated = Pipeline(_annotation(targets, exclude))(captured).program
    program = insert_adapters(quantize_groups(annotated, quant), adapter)
    undo = Undo()
    try:
        apply_adapters(model, annotated, program, undo)
        program = share_tensors(model, program)
        cross_check(program, model, args, kwargs, agreement)
    except BaseException:
        undo.run()
        raise
    return dataclasses.replace(program, notes=(*program.notes, *agreement.notes()))


def fold_adapters(program: Program) -> Program:
    """Fold trained adapters into the offsets: exact, and no adapter is left.

    Raises:
        PreconditionError: the program has no adapters, or one of them cannot fold.
    """
    return FoldAdapters()(program).program


def add_kv_cache(
    program: Program, model: nn.Module | str | Path, *, last_logits: bool = False
) -> Program:
    """The same trained language model as a graph with a key-value cache, for deployment.

    A program trains on whole sequences; a device generates token by token. The model is captured
    again with its cache as inputs and outputs (see `capture.causal_lm`), the passes that made
    `program` are run again on that graph, and the tensors of `program` are put in.

    Args:
        program: At any stage before lowering, made from a transformers decoder-only model by
            `capture_model`.
        model: That model, or a folder with its `config.json`. No weight of it is read.
        last_logits: Give logits of the last position alone.

    Raises:
        PreconditionError: `program` was made from another model.
        UnsupportedError: the model has no key-value cache, or is none of transformers.
        CaptureError: `torch.export` refused the model.
    """
    from qalora_compile.capture.causal_lm import capture_causal_lm
    from qalora_compile.capture.skeleton import build_skeleton, skeleton_of

    skeleton = build_skeleton(Path(model)) if isinstance(model, (str, Path)) else skeleton_of(model)
    return replay(program, capture_causal_lm(skeleton, last_logits=last_logits))


def lower(program: Program, spec: ExportSpec) -> Program:
    """Rewrite a program for the target of `spec`; half-precision ones compute in float32 there.

    Raises:
        PreconditionError: adapters are not folded (or nothing is quantized) and the specification
            does not allow that.
    """
    if program.stage.startswith(LEGALIZED):
        if program.stage != f"{LEGALIZED}{spec.target}":
            raise PreconditionError(
                f"the program is lowered for another target ({program.stage})",
                hint="export the folded program instead",
            )
        return program
    if program.stage in (FLOAT, ANNOTATED, ADAPTED) and not spec.allow_unfolded:
        problem, command = (
            ("its adapters are not folded", "fold first: qc.fold_adapters(program), or `fold RUN`")
            if program.stage == ADAPTED
            else ("it is not quantized", "quantize first: qc.quantize_groups(program)")
        )
        raise PreconditionError(
            f"the program cannot be exported as it is: {problem}",
            hint=f"{command}; or export it as it is with allow_unfolded=True (--allow-unfolded)",
        )
    steps: list[Pass] = [WidenHalves()] if needs_widening(program) else []
    if program.stage not in (FLOAT, ANNOTATED):
        steps += [_legalize(spec), ShareGroupSums()]
    if spec.fusion in ("standard", "ort"):
        steps += [FuseRmsNorm(), FuseRotary(), FuseAttention()]
    if spec.fusion == "ort":
        steps += [FuseSkipNorm(), FuseMultiHead()]
    return Pipeline(steps)(program).program


def complete_spec(program: Program, spec: ExportSpec) -> ExportSpec:
    """`spec` with what it leaves open decided for `program`."""
    if spec.fusion is not None:
        return spec
    fusion = "none"
    if program.signature.cache:
        opset = spec.opset or max(FUSION_OPSETS.values())
        choices = ("standard",) if spec.target == "onnx" else ("standard", "ort")  # faster first
        fusion = next((c for c in choices if FUSION_OPSETS[c] <= opset), "none")
    return dataclasses.replace(spec, fusion=fusion)


def _legalize(spec: ExportSpec) -> Pass:
    """The pass that lowers to the target of `spec`."""
    level = spec.accuracy_level
    if spec.target == "ort":
        return LegalizeOrt(accuracy_level=level, parameter_dtype=spec.parameter_dtype)
    if spec.target == "onnx":
        return LegalizeOnnx()
    return LegalizeOrtStock(accuracy_level=level, correction=spec.correction)


def export_model(
    program: Program, path: str | Path, spec: ExportSpec | None = None
) -> ExportReport:
    """Lower a folded (or quantized) program and write it as one ONNX file.

    Args:
        program: Folded; quantized without adapters is complete as well.
        path: The `.onnx` file; weights beyond 1 GiB go to `<name>.data` beside it.
        spec: Target and options; None takes target `ort`.

    Raises:
        UserInputError: the file exists and `overwrite` is false, or its name does not end in .onnx.
        PreconditionError: see `lower`.
        UnsupportedError: an operator or dtype has no form in the target.
    """
    from qalora_compile.exporters.onnx import write_onnx

    spec, path = spec or ExportSpec(), Path(path)
    if path.suffix != ".onnx":
        raise UserInputError(f"{path} does not end in .onnx", where=str(path))
    check_output(path, overwrite=spec.overwrite)
    spec = complete_spec(program, spec)
    return write_onnx(lower(program, spec), path, spec)

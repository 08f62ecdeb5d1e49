"""The steps as plain functions, in the order a user takes them; each runs a short pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.config import AUTO, FUSION_OPSETS, AdapterSpec, ExportSpec, QuantSpec, one_of
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.exporters.base import ExportReport
from qalora_compile.files import check_output
from qalora_compile.ir.program import ADAPTED, ANNOTATED, FLOAT, LEGALIZED, Program
from qalora_compile.ir.signature import Call
from qalora_compile.ir.stored import StoredWeight
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.assign_bits import AssignBits
from qalora_compile.passes.base import Pass
from qalora_compile.passes.canonicalize_pointwise import CanonicalizePointwise
from qalora_compile.passes.choose_bits import choose_bits
from qalora_compile.passes.corrections import (
    annotated_source,
    choose_ranks,
    find_corrections,
    start_from,
)
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
from qalora_compile.passes.quantize_embeddings import KEPT, QuantizeEmbeddings
from qalora_compile.passes.quantize_groups import QuantizeGroups
from qalora_compile.passes.replay import replay, replay_part
from qalora_compile.passes.select import ALL_LINEAR, as_patterns
from qalora_compile.passes.share_group_sums import ShareGroupSums
from qalora_compile.passes.split_planes import SplitPlanes
from qalora_compile.passes.train_parameters import TrainParameters
from qalora_compile.passes.widen_halves import WidenHalves, needs_widening
from qalora_compile.quantizers.calibrate import collect_statistics

if TYPE_CHECKING:
    from torch import nn


def quantize_groups(
    program: Program,
    spec: QuantSpec | None = None,
    *,
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: Iterable[str] = (),
    embeddings: QuantSpec | None = None,
    calibration: Iterable[Call] | None = None,
    stored: Mapping[str, StoredWeight] | None = None,
) -> Program:
    """Decide which linear layers to quantize, and quantize them.

    Args:
        program: At stage `float`, or `annotated` (its plan is then used as it is).
        spec: Bits, group size and method; None takes 4 bits in groups of 32, min-max.
        calibration: Calls of the program, tuples or mappings of arguments as capture takes them:
            weights are quantized to lose least on them. Method `gptq` needs it, the others
            refine their offsets by it, and bits `"auto"` are chosen by it. Positions that an
            `attention_mask` hides do not count.
        targets: `"all-linear"`, or names, dotted suffixes, globs or `re:` patterns. A site that is
            named is quantized even where the default keeps it (a head tied to the embedding).
        exclude: Patterns of layers to keep in float.
        embeddings: Bits (8 or 4) and group size of embeddings and of the head, which then get whole
            zero-points and no adapter, see `passes.quantize_embeddings`; None leaves embeddings,
            and heads tied to them, in float.
        stored: Weights that the checkpoint holds quantized (`Source.stored`), by path: they are
            taken as they are, with their own bits and group sizes, and no other is quantized.

    Raises:
        UserInputError: a pattern matches nothing, a weight is not finite, nothing is left to
            quantize, of embeddings and heads too where they are asked for, calibration data are
            missing, do not fit or are all padding, or the budget of bits `"auto"` is too small.
        PreconditionError: the program is at another stage.
    """
    if stored:
        return _take_stored(program, stored, exclude)
    calls = None if calibration is None else tuple(calibration)
    steps: list[Pass] = []
    if program.stage != ANNOTATED:
        steps = _annotation(targets, exclude, keep_heads=embeddings is not None)
    quantize = QuantizeGroups(**(spec or QuantSpec()).to_json(), calibration=calls)
    reasons: Mapping[str, str] = {}
    if quantize.bits == AUTO and calls is not None:
        program = Pipeline(steps)(program).program if steps else program
        assign, reasons = choose_bits(program, quantize, calls)
        steps = [assign]
    steps.append(quantize)
    if embeddings is not None:
        one_of("method of embeddings", embeddings.method, (QuantSpec().method,))
        steps.append(QuantizeEmbeddings(bits=embeddings.width, group_size=embeddings.group_size))
    result = Pipeline(steps)(program)
    if embeddings is not None and not any(site.whole for site in result.program.plan):
        why = "; ".join(f"{skip.path}: {skip.why}" for skip in result.skips if skip.what == KEPT)
        raise UserInputError(
            "there is no embedding and no head to quantize",
            where=why or "the model has none",
            hint="leave out the option for embeddings",
        )
    plan = result.program.plan.explain("why_bits", reasons)
    return result.program.evolve(plan=plan) if reasons else result.program


def _take_stored(
    program: Program, stored: Mapping[str, StoredWeight], exclude: Iterable[str]
) -> Program:
    """The program with the codes that a checkpoint holds."""
    annotated = Pipeline(_annotation(tuple(stored), exclude))(program).program
    weights = {site.path: stored[site.path] for site in annotated.plan.weights_to_quantize()}
    choices = tuple(f"{path}={w.bits}/{w.group_size}" for path, w in weights.items())
    steps: list[Pass] = [AssignBits(choices=choices), QuantizeGroups(stored=weights)]
    return Pipeline(steps)(annotated).program


def _annotation(
    targets: str | Iterable[str], exclude: Iterable[str], *, keep_heads: bool = False
) -> list[Pass]:
    """The passes that take a float program to stage `annotated`."""
    wanted = targets if isinstance(targets, str) else as_patterns(list(targets), "targets")
    barred = as_patterns(exclude if isinstance(exclude, str) else list(exclude), "exclude")
    annotate = AnnotateLinears(targets=wanted, exclude=barred, keep_heads=keep_heads)
    return [CanonicalizePointwise(), annotate]


def insert_adapters(
    program: Program,
    spec: AdapterSpec | None = None,
    *,
    source: Program | None = None,
    calibration: Iterable[Call] | None = None,
    train: str | Iterable[str] = (),
) -> Program:
    """Put a trainable pooled adapter beside every quantized layer.

    The function stays the same, but with `init="svd"`: then the adapters start as what their rank
    can make up for of the quantization error.

    Args:
        program: At stage `quantized`.
        spec: Rank, scaling, pooling and start; None takes rank 16.
        source: The program before quantization, float or annotated; for init `"svd"` and rank
            `"auto"`, which compare its weights with the quantized ones.
        calibration: Arguments of a few typical calls. With them the error of a layer's output
            counts, for the inputs that it has in `source`; without, that of its weights.
        train: Parameters, or modules, that are to train in float beside the adapters, such as a new
            head; see `passes.train_parameters`. Their weights must have been kept in float.

    Raises:
        PreconditionError: the program is not at stage `quantized`, the adapter's group size is no
            multiple of the quantization group, `source` is missing or another model, or a weight
            in `train` is quantized.
        UserInputError: calls do not fit the program, the rank budget is too small, or a pattern of
            `train` fits no parameter.
    """
    adapted = _with_adapters(program, spec or AdapterSpec(), source, calibration)
    names = as_patterns(train if isinstance(train, str) else list(train), "train")
    return TrainParameters(names=names)(adapted).program if names else adapted


def _with_adapters(
    program: Program,
    spec: AdapterSpec,
    source: Program | None,
    calibration: Iterable[Call] | None,
) -> Program:
    """`insert_adapters`, without parameters that train beside them."""
    if spec.rank != AUTO and spec.init == "zeros":
        return _insert(program, InsertAdapters(**spec.to_json()))
    if source is None:
        raise PreconditionError(
            f"rank {spec.rank!r} with init {spec.init!r} looks at the weights before quantization",
            hint="give the program that they are in: source=captured",
        )
    source = annotated_source(source, program)
    statistics = {} if calibration is None else collect_statistics(source, calibration)
    choose = partial(find_corrections, source, program, statistics=statistics)
    insert, reasons = choose_ranks(spec, choose)
    adapted = _insert(program, insert)
    adapted = adapted.evolve(plan=adapted.plan.explain("why_rank", reasons))
    return adapted if spec.init == "zeros" else start_from(adapted, insert, choose(insert))


def _insert(program: Program, insert: InsertAdapters) -> Program:
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
    calibration: Sequence[Call] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Quantize and adapt a model in place, module by module, by the plan of its captured graph.

    For `generate()`, `labels`, gradient checkpointing, the Hugging Face Trainer. Linear layers
    become `AdaptedLinear`; where only a weight can be replaced (packed attention, 1×1 convolutions,
    experts) it is parametrized. All else is frozen.

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
        calibration: As for `quantize_groups` and `insert_adapters`.
        dynamic_shapes: As for `capture_model`.

    Raises:
        CaptureError: `torch.export` refused the model, or captured something else than it computes.
        UnsupportedError: a module cannot hold its quantized weight.
        VerificationError: model and program differ, as by a path around an adapter.
        UserInputError: as for the two steps.

    After an error the model is as it was.
    """
    from qalora_compile.capture.model import capture_model
    from qalora_compile.eager.apply import Undo, apply_adapters, share_tensors
    from qalora_compile.eager.check import Agreement, cross_check

    args, kwargs = tuple(args), dict(kwargs or {})
    captured = capture_model(model, args, kwargs, dynamic_shapes)
    agreement = Agreement.find(captured, model, args, kwargs)
    annotated = Pipeline(_annotation(targets, exclude))(captured).program
    program = quantize_groups(annotated, quant, calibration=calibration)
    program = insert_adapters(program, adapter, source=annotated, calibration=calibration)
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
    from qalora_compile.capture.skeleton import as_skeleton

    return replay(program, capture_causal_lm(as_skeleton(model), last_logits=last_logits))


def packed_form(program: Program, model: nn.Module | str | Path, *, max_length: int) -> Program:
    """The same language model, over the same tensors, for several examples in one row.

    For training on rows of `training.Packed`: what is trained in one form is trained in the other,
    since they share their parameters. The model is captured again (see `capture.packed`), the
    passes that made `program` are run again, and it is tried out that no example sees another.

    Args:
        program: At any stage before lowering, made from a transformers decoder-only model by
            `capture_model`, with `input_ids` and `attention_mask` as keyword inputs.
        model: That model, or a folder with its `config.json`. No weight of it is read.
        max_length: The longest row.

    Raises:
        PreconditionError: `program` was made from another model.
        UnsupportedError: the model cannot keep examples in a row apart, or was tried and does not.
        CaptureError: `torch.export` refused the model.
    """
    from qalora_compile.capture.encoder_decoder import disable_cache
    from qalora_compile.capture.packed import capture_packed
    from qalora_compile.capture.skeleton import as_skeleton
    from qalora_compile.training.packed import check_packed

    skeleton = as_skeleton(model)
    disable_cache(skeleton)
    packed = replay(program, capture_packed(skeleton, max_length=max_length))
    check_packed(program, packed)
    return packed


def split_encoder_decoder(
    program: Program, model: nn.Module | str | Path
) -> tuple[Program, Program]:
    """The same trained encoder-decoder model as the two graphs that a device runs.

    The encoder runs once for an input, and computes also the keys and values of cross-attention;
    the decoder, which takes them and a cache of its own, runs token by token. Inputs and outputs:
    see `capture.encoder_decoder`. As in `add_kv_cache`, the passes that made `program` are run
    again on each graph, and the tensors of `program` are put in.

    Args:
        program: At any stage before lowering, made by `capture_model` from an encoder-decoder model
            of transformers that takes tokens (T5, BART) or log-mel features (Whisper).
        model: That model, or a folder with its `config.json`. No weight of it is read.

    Returns:
        Encoder and decoder. What both read, such as a shared embedding, is one tensor object.

    Raises:
        PreconditionError: `program` was made from another model.
        UnsupportedError: the model has no encoder and decoder with a key-value cache, or is none of
            transformers.
        CaptureError: `torch.export` refused the model.
    """
    from qalora_compile.capture.encoder_decoder import capture_decoder, capture_encoder
    from qalora_compile.capture.skeleton import as_skeleton

    skeleton = as_skeleton(model)
    encoder, decoder = (
        replay_part(program, capture(skeleton)) for capture in (capture_encoder, capture_decoder)
    )
    paths = {row.path for part in (encoder, decoder) for row in part.plan.to_quantize()}
    lost = [row.name for row in program.plan.to_quantize() if row.path not in paths]
    if lost:
        raise PreconditionError(
            f"neither encoder nor decoder reads {len(lost)} quantized layers of the program",
            where=", ".join(lost[:3]),
            hint="give the model that the program was made from",
        )
    return encoder, decoder


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
        wide = any(site.whole and site.bits == 8 for site in program.plan)
        if wide and spec.accuracy_level == 0:  # kernels on int8 activations take 8 bits as they are
            steps.append(SplitPlanes())
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
    program: Program,
    path: str | Path,
    spec: ExportSpec | None = None,
    *,
    resume: str | None = None,
) -> ExportReport:
    """Lower a folded (or quantized) program and write it as one ONNX file.

    Args:
        program: Folded; quantized without adapters is complete as well.
        path: The `.onnx` file; weights beyond 1 GiB go to `<name>.data` beside it.
        spec: Target and options; None takes target `ort`.
        resume: A short key of all that determines the file, for models that take long to write: a
            run with the same key that was interrupted is gone on with.

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
    return write_onnx(lower(program, spec), path, spec, resume=resume)

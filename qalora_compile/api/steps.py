"""From a captured program to a folded one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.config import AUTO, AdapterSpec, QuantSpec, one_of
from qalora_compile.config.adapter import QAT
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointCodes
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.ir.stages import ANNOTATED
from qalora_compile.passes.analysis.select_sites import ALL_LINEAR, as_patterns
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize.canonical_passes import canonical_passes
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.passes.framework.base import Pass
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.insert_adapters import InsertAdapters
from qalora_compile.passes.quantize_embeddings import KEPT, QuantizeEmbeddings
from qalora_compile.passes.quantize_groups import QuantizeGroups
from qalora_compile.passes.recipes.choose_bits import choose_bits
from qalora_compile.passes.recipes.lora_init import (
    LoraInit,
    annotated_source,
    choose_ranks,
    find_lora_init,
    start_codes,
    start_from,
)
from qalora_compile.passes.recipes.reuse_codes import reuse_codes
from qalora_compile.passes.share_group_sums import ShareGroupSums
from qalora_compile.passes.train_parameters import TrainParameters
from qalora_compile.quantizers.bounded_statistics import StatisticsInParts
from qalora_compile.quantizers.calibrate import as_calls
from qalora_compile.quantizers.low_rank import CorrectionTally
from qalora_compile.quantizers.statistics import ActivationStatistics

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
    stored: CheckpointCodes | None = None,
    checkpoints: Path | None = None,
) -> Program:
    """Choose the linear layers to quantize, and quantize them.

    Args:
        program: At stage `float`, or `annotated` (then its plan is used unchanged).
        spec: Bits, group size and method; None takes 4 bits in groups of 32, min-max.
        calibration: Arguments of calls of the program, as tuples or mappings like those of
            capture, on which the quantization error is minimized. Methods `gptq` and `learned`
            require it, the others refine their offsets with it, and bits `"auto"` are chosen with
            it. Positions that an `attention_mask` hides do not count.
        targets: `"all-linear"`, or names, dotted suffixes, globs or `re:` patterns. A named site
            is quantized even if the default keeps it (a head tied to the embedding).
        exclude: Patterns of layers to keep in float.
        stored: Codes of a quantized checkpoint, read by `capture.load_source.load_source`. Its
            weights keep their codes, whatever `spec` says; None quantizes all weights.
        checkpoints: A folder in which method `learned` saves its work every few steps; the same
            call with the same folder goes on from there. It is not removed. None saves nothing.
        embeddings: Bits (8 or 4) and group size of embeddings and of the head, which then get
            integer zero-points and no adapter, see `passes.quantize_embeddings`; None leaves
            embeddings, and heads tied to them, in float.

    Raises:
        UserInputError: a pattern matches nothing, a weight is not finite, there is nothing to
            quantize (or no embedding or head, if `embeddings` is given), calibration data are
            missing, do not fit, are too few for `learned` or are all padding, the budget of bits
            `"auto"` is too small, or a loss of `learned` is not finite.
        UnsupportedError: the model gives no logits, which `learned` needs.
        PreconditionError: the program is at another stage.
    """
    if program.stage != ANNOTATED:
        annotation = _annotation(targets, exclude, keep_heads=embeddings is not None)
        program = Pipeline(annotation)(program).program
    calls = None if calibration is None else as_calls(calibration)
    steps, reasons = _coding(program, spec or QuantSpec(), calls, stored, checkpoints)
    if embeddings is not None:
        one_of("method of embeddings", embeddings.method, (QuantSpec().method,))
        steps.append(QuantizeEmbeddings(bits=embeddings.width, group_size=embeddings.group))
    result = Pipeline(steps)(program)
    if embeddings is not None and not any(site.frozen_integer_zero for site in result.program.plan):
        why = "; ".join(f"{skip.path}: {skip.why}" for skip in result.skips if skip.what == KEPT)
        raise UserInputError(
            "there is no embedding and no head to quantize",
            where=why or "the model has none",
            hint="leave out the option for embeddings",
        )
    plan = result.program.plan.explain("why_bits", reasons)
    return result.program.evolve(plan=plan) if reasons else result.program


def _coding(
    annotated: Program,
    spec: QuantSpec,
    calls: tuple[Call, ...] | None,
    stored: CheckpointCodes | None,
    checkpoints: Path | None,
) -> tuple[list[Pass], Mapping[str, str]]:
    """The passes that plan bits and quantize; and path → reason of the chosen bits.

    Raises:
        UserInputError: see `choose_bits`; or bits are `"auto"` and `stored` codes are given.
    """
    quantize = QuantizeGroups(**spec.to_json(), calibration=calls, checkpoints=checkpoints)
    if stored is not None:
        if spec.bits == AUTO:
            raise UserInputError(
                "bits 'auto' chooses new codes, but the weights keep those of their checkpoint",
                hint="leave out stored to requantize all weights",
            )
        kept = reuse_codes(annotated, stored)
        quantize = dataclasses.replace(quantize, stored=kept.weights)
        return [*kept.steps, quantize], kept.reasons
    if spec.bits == AUTO and calls is not None:
        assign, reasons = choose_bits(annotated, quantize, calls)
        return [assign, quantize], reasons
    return [quantize], {}


def _annotation(
    targets: str | Iterable[str], exclude: Iterable[str], *, keep_heads: bool = False
) -> list[Pass]:
    """The passes that take a float program to stage `annotated`."""
    wanted = targets if isinstance(targets, str) else as_patterns(list(targets), "targets")
    barred = as_patterns(exclude if isinstance(exclude, str) else list(exclude), "exclude")
    annotate = AnnotateLinears(targets=wanted, exclude=barred, keep_heads=keep_heads)
    return [*canonical_passes(), annotate]


def insert_adapters(
    program: Program,
    spec: AdapterSpec | None = None,
    *,
    source: Program | None = None,
    calibration: Iterable[Call] | None = None,
    train: str | Iterable[str] = (),
) -> Program:
    """Add a trainable pooled adapter to every quantized layer.

    The function stays the same, except with `init="svd"`: then the adapters start as the best
    correction of the quantization error that their rank allows. Offsets that were refined at
    quantization (`QuantSpec.refine_offsets`) leave almost nothing for it and for rank `"auto"` to
    correct. The program's notes say so, and report layers with too few calibration rows.

    Args:
        program: At stage `quantized`.
        spec: Rank, scaling, pooling and start; None takes rank 16.
        source: The program before quantization, float or annotated; for init `"svd"` and rank
            `"auto"`, which compare its weights with the quantized ones, and for kind `"qat"`, whose
            codes then train from its weights and not from the codes (which needs it not).
        calibration: Arguments of a few typical calls. With them, the error of a layer's output on
            its inputs in `source` counts; without them, the error of its weights.
        train: Parameters or modules, such as a new head, to train in float together with the
            adapters; see `passes.train_parameters`. Their weights must be kept in float.

    Raises:
        PreconditionError: the program is not at stage `quantized`, the adapter's group size is no
            multiple of the quantization group, `source` is missing or is another model, or a weight
            in `train` is quantized.
        UserInputError: calls do not fit the program, the rank budget is too small, or a pattern of
            `train` matches no parameter.
    """
    spec = spec or AdapterSpec()
    adapted = _with_adapters(program, spec, source, calibration)
    if spec.kind == QAT and source is not None:
        adapted = start_codes(adapted, annotated_source(source, program))
    names = as_patterns(train if isinstance(train, str) else list(train), "train")
    return TrainParameters(names=names)(adapted).program if names else adapted


def _with_adapters(
    program: Program,
    spec: AdapterSpec,
    source: Program | None,
    calibration: Iterable[Call] | None,
) -> Program:
    """`insert_adapters` without `train`."""
    if spec.rank != AUTO and spec.init == "zeros":
        return _insert(program, InsertAdapters(**spec.to_json()))
    if source is None:
        raise PreconditionError(
            f"rank {spec.rank!r} with init {spec.init!r} needs the weights before quantization",
            hint="give the program that holds them: source=captured",
        )
    annotated = annotated_source(source, program)
    known: Mapping[str, ActivationStatistics] = {}
    if calibration is not None:
        known = StatisticsInParts(annotated, calibration)
    tally = CorrectionTally()

    def find(insert: InsertAdapters) -> Iterator[LoraInit]:
        for correction in find_lora_init(annotated, program, insert, known):
            tally.add(correction.site.path, correction.parts)
            yield correction

    insert, reasons = choose_ranks(spec, find)
    adapted = _insert(program, insert)
    adapted = adapted.evolve(plan=adapted.plan.explain("why_rank", reasons))
    if spec.init != "zeros":
        adapted = start_from(adapted, insert, find(insert))
    notes = tally.notes(refined=bool(known) and _refines_offsets(program))
    return dataclasses.replace(adapted, notes=(*adapted.notes, *notes))


def _refines_offsets(quantized: Program) -> bool:
    """Whether weights were quantized with `refine_offsets`, which is effective only with data."""
    steps = [step for entry in quantized.history for step in Pipeline.parse(entry).passes]
    return any(isinstance(step, QuantizeGroups) and step.refine_offsets for step in steps)


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

    This keeps `generate()`, `labels`, gradient checkpointing and the Hugging Face Trainer usable.
    Linear layers become `AdaptedLinear`. Where only the weight can be replaced (packed attention,
    1×1 convolutions, experts), it is parametrized. Everything else is frozen.

    The returned program shares the model's tensors, under the same names: train the model, then
    call `fold_adapters(program)` and export. Before this function returns, it runs program and
    model with random adapters and compares them.

    Args:
        model: The model; a quantized weight that no module reads in float is freed.
        args: Example positional arguments, as for `capture_model`.
        kwargs: Example keyword arguments.
        quant: As for `quantize_groups`.
        adapter: As for `insert_adapters`.
        targets: As for `quantize_groups`.
        exclude: As for `quantize_groups`.
        calibration: As for `quantize_groups` and `insert_adapters`.
        dynamic_shapes: As for `capture_model`.

    Raises:
        CaptureError: `torch.export` refused the model, or captured another function.
        UnsupportedError: a module cannot hold its quantized weight or its kind of adapter.
        VerificationError: model and program differ, for example by a path around an adapter.
        UserInputError: see `quantize_groups` and `insert_adapters`.

    After an error the model is unchanged.
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
    """Fold trained adapters exactly into the offsets; no adapter remains.

    Raises:
        PreconditionError: the program has no adapters, or one of them cannot fold.
    """
    return FoldAdapters()(program).program

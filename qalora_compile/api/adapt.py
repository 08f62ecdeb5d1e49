"""`adapt`: combine a base model and adapters trained by PEFT into a RUN folder for `fold_run`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qalora_compile.api.codes import CodesSpec, stored_codes
from qalora_compile.api.pooling import keep_pooling
from qalora_compile.api.run_folder import MODEL, write_run
from qalora_compile.api.steps import quantize_groups
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.capture.peft_adapters import (
    PeftAdapter,
    as_pooled,
    merge_,
    put_saved_,
    read_peft_adapter,
)
from qalora_compile.config import QuantSpec
from qalora_compile.config.choices import APPROXIMATE, MERGE, REFUSE
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, reserve
from qalora_compile.ir.checkpoint_codes import CheckpointCodes
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.lora_update import LowRankUpdate
from qalora_compile.ir.program import Program
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize.canonical_passes import canonical_passes
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.recipes.import_lora import Updates, import_lora, losses
from qalora_compile.progress import say
from qalora_compile.quantizers.report import QuantReport, collecting_reports


@dataclass(frozen=True, kw_only=True)
class AdaptSpec:
    """A base model and adapters trained by PEFT.

    Attributes:
        model: The base: a Hugging Face folder or `.gguf` file.
        adapter: Folders of PEFT adapters, whose updates are summed.
        out: The RUN folder to write.
        weights: The factor of each adapter in the sum; None means 1 for each.
        plain: How to treat updates that do not fold: `"refuse"`, `"approximate"` by the nearest
            one that does, or `"merge"` into the float weights before they are quantized.
        pooling: The pooling of adapters that pool but do not declare it in their settings.
        codes: How the base is quantized.
        overwrite: Replace an existing RUN folder.
    """

    model: str
    adapter: tuple[str, ...]
    out: Path
    weights: tuple[float, ...] | None = None
    plain: str = REFUSE
    pooling: str | None = None
    codes: CodesSpec = field(default_factory=CodesSpec)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.codes.needs_calibration:
            raise UserInputError(
                f"the method {self.codes.method} needs calibration data, which adapt does not take",
                hint="use --method hqq",
            )
        if self.weights is not None and len(self.weights) != len(self.adapter):
            raise UserInputError(
                f"there are {len(self.weights)} weights for {len(self.adapter)} adapters",
                hint="give one for each",
            )

    @property
    def each_weight(self) -> list[float]:
        """The factor of each adapter, 1 by default."""
        return list(self.weights or [1.0] * len(self.adapter))


@dataclass(frozen=True, kw_only=True)
class AdaptResult:
    """The result of `adapt`.

    Attributes:
        program: The quantized program with its adapters.
        reports: The quantization error of each layer.
        bases: Names of the models that the adapters were trained on; "" if not recorded.
        adapted: The number of layers with an update.
        lost: Layer path → lost fraction of its update; 0 if it folds exactly.
        rounded: Half-precision weights that an update was merged into, and that were rounded again.
        saved: The number of full parameters stored with the adapters; they replace the base's.
    """

    program: Program
    reports: tuple[QuantReport, ...]
    bases: tuple[str, ...]
    adapted: int
    lost: Mapping[str, float]
    rounded: tuple[str, ...]
    saved: int


def adapt(spec: AdaptSpec) -> AdaptResult:
    """Quantize a model, import adapters trained by PEFT, and write `spec.out`.

    Raises:
        UserInputError: a folder cannot be read, an update does not fold, or the output exists.
        UnsupportedError: the adapters are of a kind that has no pooled form.
        OutputError: the folder cannot be written.
    """
    inputs = [spec.model, *spec.adapter]
    with reserve(spec.out, overwrite=spec.overwrite, inputs=inputs):
        return _adapt(spec)


def _adapt(spec: AdaptSpec) -> AdaptResult:
    quant, adapters = spec.codes.quant(), _read(spec)
    with collecting_reports() as reports:
        say(f"load {spec.model}")
        source = load_source(spec.model, zero_points=spec.codes.stored_zero_points)
        adapters = [as_pooled(each, source.model, spec.pooling) for each in adapters]
        saved = put_saved_(source.model, adapters)
        stored, updates = _stored(spec, source), _together(adapters)
        program, lost, rounded = _adapted(spec, source, updates, quant, stored)
    check_program(program)
    _write(spec, program, source, quant, lost)
    return AdaptResult(
        program=program,
        reports=tuple(reports),
        bases=tuple(dict.fromkeys(adapter.base or "" for adapter in adapters)),
        adapted=len(updates),
        lost=lost,
        rounded=rounded,
        saved=len(saved),
    )


def _write(
    spec: AdaptSpec, program: Program, source: Source, quant: QuantSpec, lost: Mapping[str, float]
) -> None:
    """Write the RUN folder."""
    record: dict[str, Any] = {
        "model": spec.model,
        "quant": quant.to_json(),
        "adapter": {
            "peft": [str(Path(folder).resolve()) for folder in spec.adapter],
            "weights": spec.each_weight,
            "plain": spec.plain,
            "pooling": spec.pooling,
            "lost": {path: part for path, part in lost.items() if part},
        },
        "status": "finished",
        "step": 0,
    }
    with atomic_folder(spec.out, overwrite=spec.overwrite) as folder:
        write_run(folder, program, source, record)
        keep_pooling(Path(spec.model), folder / MODEL)


def _stored(spec: AdaptSpec, source: Source) -> CheckpointCodes | None:
    """The checkpoint's codes to keep; None if merging changes the weights."""
    codes = stored_codes(spec.codes, source)
    if spec.plain != MERGE or codes is None:
        return codes
    say(
        f"note: the {len(codes)} quantized tensors of {source.reference} are requantized, since "
        "--plain merge changes their weights"
    )
    return None


def _adapted(
    spec: AdaptSpec,
    source: Source,
    updates: Updates,
    quant: QuantSpec,
    stored: CheckpointCodes | None,
) -> tuple[Program, dict[str, float], tuple[str, ...]]:
    """The program with its adapters, the loss of each update, and the weights that were rounded.

    Merging an update into a half-precision weight rounds the sum, unless the weight is quantized:
    then the sum is quantized from float32.
    """
    wide = merge_(source.model, updates) if spec.plain == MERGE else {}
    updates = {} if spec.plain == MERGE else updates
    annotate = AnnotateLinears(targets=spec.codes.layers, exclude=spec.codes.exclude)
    annotated = Pipeline([*canonical_passes(), annotate])(source.capture()).program
    on_codes = {site.weight for site in annotated.plan.weights_to_quantize()}
    tensors = annotated.tensors() | {
        name: nn.Parameter(values, requires_grad=False)
        for name, values in wide.items()
        if name in on_codes
    }
    annotated = annotated.evolve(graph=annotated.copy_graph(), tensors=tensors)
    program = quantize_groups(annotated, quant, stored=stored)
    approximate = spec.plain == APPROXIMATE
    adapted = import_lora(program, updates, approximate=approximate)
    return adapted, losses(program, updates), tuple(wide.keys() - on_codes)


def _together(adapters: Sequence[PeftAdapter]) -> Updates:
    """Layer path → its updates from all adapters."""
    found: dict[str, list[LowRankUpdate]] = defaultdict(list)
    for adapter in adapters:
        for path, update in adapter.updates.items():
            found[path].append(update)
    return found


def _read(spec: AdaptSpec) -> list[PeftAdapter]:
    pairs = zip(spec.adapter, spec.each_weight, strict=True)
    return [read_peft_adapter(folder, weight=weight) for folder, weight in pairs]

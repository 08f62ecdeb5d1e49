"""Frozen, keyword-only specifications; each goes to JSON and back, and refuses unknown keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from qalora_compile.errors import UnsupportedError, UserInputError

SUPPORTED_BITS = (2, 3, 4, 8)
AUTO = "auto"
"""A value of `bits`, `group_size` and `rank`: chosen layer by layer, within a budget."""
METHODS = ("minmax", "mse", "hqq", "gptq")
"""Each loses less than the one before it, as a rule in the output of a layer; for certain, up to
`hqq`, in the squared error of the weights, and `hqq` on calibration data in the output too."""
CALIBRATED = ("gptq",)
"""The methods that need calibration data."""
POOLINGS = ("sum", "mean", "mean_times_groups", "scaled_sum")
INITS = ("zeros", "svd")
ZERO_POINTS = ("real", "integer")
ADAPTER_KINDS = ("lora", "scale")
BUDGET_UNITS = ("bits", "stored-bits", "megabytes")
AUTO_GROUPS = (32, 64, 128)
"""What group size `"auto"` chooses from."""
ONNX_TARGETS = ("ort", "ort-stock", "onnx")
CHECKPOINT_TARGETS = (
    *("gguf", "mlx", "float", "hqq", "safetensors"),
    *("gptq", "compressed-tensors"),
)
"""Checkpoints of other libraries; the last two hold whole zero-points only."""
TARGETS = (*ONNX_TARGETS, *CHECKPOINT_TARGETS)
FLOAT_TYPES = ("q8_0", "f16", "bf16", "f32")
"""How a GGUF file holds a matrix of floats, smallest first."""
ACCURACY_LEVELS = (0, 4)
PARAMETER_DTYPES = ("float32", "float16")
CORRECTIONS = ("fp32", "digits")
FUSION_OPSETS = {"none": 18, "standard": 23, "ort": 22}
"""Ways to write the parts of a transformer, and the opset that each needs.

`ort` needs no operator of opset 22: ONNX Runtime releases before 1.21 do not take it, and these
compute MultiHeadAttention wrongly for masks that differ inside a batch."""
FUSIONS = tuple(FUSION_OPSETS)

Pooling = Literal["sum", "mean", "mean_times_groups", "scaled_sum"]

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of the specifications."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
            for f in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls: type[S], value: Mapping[str, Any]) -> S:
        """Build a specification from JSON types.

        Raises:
            UserInputError: a key is unknown, or a value is out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in value:
            if key not in names:
                raise UserInputError(
                    f"{cls.__name__} has no field {key!r}", hint=f"fields: {', '.join(names)}"
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse a value that is none of those allowed.

    Raises:
        UserInputError: the value is another, or of another type.
    """
    if value not in allowed or type(value) is not type(allowed[0]):  # 4.0 and True are no 4 and 1
        raise UserInputError(
            f"{field} is {value!r}", hint=f"use one of {', '.join(map(str, allowed))}"
        )


LARGEST_SEED = 2**63 - 1
"""Of torch's generators, which take a seed as a signed integer of 64 bits."""


def check_int(field: str, value: object, *, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number from `least` to `most`.

    Raises:
        UserInputError: it is none; the field is named.
    """
    highest = math.inf if most is None else most
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= highest:
        limit = "or more" if most is None else f"to {most}"
        raise UserInputError(f"{field} is {value!r}", hint=f"use a whole number, {least} {limit}")


def _is_positive(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < float("inf")


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Spec):
    """How weights are quantized in groups along the reduction axis.

    Attributes:
        bits: Width of a code: 2, 3, 4 or 8; or `"auto"`, a width for each layer by what it loses
            there, within `budget`.
        group_size: Weights that share one scale and offset; the last group of a row may be shorter.
            With bits `"auto"` it may be `"auto"` too: 32, 64 or 128 for each layer, where that
            loses least for its bytes.
        method: How scale, offset and codes are chosen. `"minmax"` rounds to the nearest of
            2^bits levels between the group's smallest and largest weight (arXiv 2309.14717, Eq. 1);
            `"mse"` searches for the range that loses least; `"hqq"` fits it half-quadratically,
            and with calibration data keeps no row of a weight whose outputs lose more than with
            `"mse"`; `"gptq"` (arXiv 2210.17323) needs calibration data.
        refine_offsets: Where there are calibration data, move the offsets to where the output error
            is least, given the codes and the scale; the less, the fewer calibration rows there are.
            This costs nothing at run time. It leaves nothing to init `"svd"` and rank `"auto"`.
        act_order: Of `"gptq"`: round the columns that are most active first; groups stay as they
            are. False: from left to right.
        damping: Of `"gptq"`: part of the mean diagonal of the second moments that is added to their
            diagonal; more is added where calibration rows are few.
        budget: Most that the weights may take with bits `"auto"`, in `budget_unit`.
        budget_unit: `"bits"`: the mean width of a code, over all weights that are quantized;
            `"stored-bits"`: the mean of what a weight takes, scales and offsets included;
            `"megabytes"`: 10⁶ bytes of codes, scales and offsets, as this package stores them.
        zero_point: `"integer"`: zero-points are whole numbers from 0 to 2^bits − 1, for runtimes
            that take nothing else; with method `"minmax"`. Offsets are then never refined.
    """

    bits: int | str = 4
    group_size: int | str = 32
    method: str = "minmax"
    refine_offsets: bool = True
    act_order: bool = True
    damping: float = 0.01
    budget: float | None = None
    budget_unit: str = "bits"
    zero_point: str = "real"

    def __post_init__(self) -> None:
        if self.bits != AUTO:
            one_of("bits", self.bits, SUPPORTED_BITS)
        if not (_is_positive(self.budget) if self.bits == AUTO else self.budget is None):
            raise UserInputError(
                f"budget is {self.budget!r} with bits {self.bits!r}",
                hint="bits 'auto' takes a budget, a number above 0; other bits take none",
            )
        one_of("budget_unit", self.budget_unit, BUDGET_UNITS)
        self._check_group_size()
        one_of("method", self.method, METHODS)
        one_of("zero_point", self.zero_point, ZERO_POINTS)
        if self.zero_point == "integer" and self.method != "minmax":
            raise UserInputError(
                f"zero_point is 'integer' with method {self.method!r}",
                hint="method 'minmax' can round to levels whose zero-points are whole numbers",
            )
        one_of("refine_offsets", self.refine_offsets, (True, False))
        one_of("act_order", self.act_order, (True, False))
        if not (isinstance(self.damping, float) and 0 < self.damping <= 1):
            raise UserInputError(f"damping is {self.damping!r}", hint="use e.g. 0.01, 1 at most")

    def _check_group_size(self) -> None:
        if self.group_size != AUTO:
            return check_int("group_size", self.group_size, least=1)
        if self.bits != AUTO:
            raise UserInputError(
                f"group_size is 'auto' with bits {self.bits!r}",
                hint="group sizes are chosen together with bits 'auto', within one budget",
            )
        if self.budget_unit == "bits":
            raise UserInputError(
                "the mean width of a code does not limit group_size 'auto': the smallest is best",
                hint="give a budget that counts scales and offsets: budget_unit 'stored-bits', "
                "or 'megabytes'",
            )
        return None

    @property
    def width(self) -> int:
        """Bits, where all weights have the same.

        Raises:
            UserInputError: they are `"auto"`.
        """
        if not isinstance(self.bits, int):
            raise UserInputError(f"bits are {self.bits!r}", hint="assign-bits chooses them")
        return self.bits

    @property
    def group(self) -> int:
        """Group size, where all weights have the same.

        Raises:
            UserInputError: it is `"auto"`.
        """
        if not isinstance(self.group_size, int):
            raise UserInputError(
                f"group_size is {self.group_size!r}", hint="assign-bits chooses it"
            )
        return self.group_size


@dataclass(frozen=True, kw_only=True)
class AdapterSpec(Spec):
    """A pooled low-rank adapter: y += scaling · f · (S(x) Aᵀ) Bᵀ, S the sum of x inside a group.

    Attributes:
        rank: r, the inner width of A: [r, L] and B: [N, r]; or `"auto"`, a rank for each layer by
            what it gains there, within `rank_budget`.
        alpha: Numerator of `scaling`, alpha / rank (or alpha / √rank with `use_rslora`).
        pooling: The convention behind f: `"sum"` 1 (the paper's Algorithm 1), `"mean"` 1/g (the
            authors' code), `"mean_times_groups"` L/g (PEFT's `use_qalora`), `"scaled_sum"` 1/√g
            (independent inputs keep their variance).
        group_size: Width of a pooling group; None takes the quantization group. It must be a
            multiple of the quantization group, or the adapter could not fold.
        use_rslora: Scale by alpha / √rank.
        dropout: In training, each number of the pooled input of an adapter is dropped with this
            probability, and the others are scaled up. In evaluation, and folded, nothing is left
            of it.
        seed: Seed of A's initial values.
        init: `"zeros"`: B starts at zero, and the model as it was quantized. `"svd"`: B A starts as
            the best correction of rank r of the quantization error that folds.
        rank_budget: Most parameters of all adapters together, with rank `"auto"`.
        kind: `"lora"`: the update of Algorithm 1, which moves zero-points. `"scale"`: the scales
            alone are trained, scale' = scale · (1 + scaling · f · B A), and zero-points stay the
            whole numbers that they are.
        zero_point: Of kind `"lora"`. `"integer"`: the moved zero-points are rounded to whole
            numbers while they are trained, so that what is deployed is what was trained.

    Kind `"scale"` and zero_point `"integer"` need weights quantized with
    `QuantSpec(zero_point="integer")`, and pool in their groups.
    """

    rank: int | str = 16
    alpha: float = 32.0
    pooling: str = "sum"
    group_size: int | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    seed: int = 0
    init: str = "zeros"
    rank_budget: int | None = None
    kind: str = "lora"
    zero_point: str = "real"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, ADAPTER_KINDS)
        one_of("zero_point", self.zero_point, ZERO_POINTS)
        self._check_variant()
        if self.rank == AUTO:
            check_int("rank_budget, with rank 'auto',", self.rank_budget, least=1)
        else:
            check_int("rank", self.rank, least=1)
            if self.rank_budget is not None:
                raise UserInputError(
                    f"rank_budget is {self.rank_budget!r} with rank {self.rank!r}",
                    hint="it is for rank 'auto'",
                )
        one_of("init", self.init, INITS)
        one_of("pooling", self.pooling, POOLINGS)
        one_of("use_rslora", self.use_rslora, (True, False))
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise UserInputError(f"dropout is {self.dropout!r}", hint="use e.g. 0.05, below 1")
        check_int("seed", self.seed, least=0, most=LARGEST_SEED)
        if self.group_size is not None:
            check_int("adapter group_size", self.group_size, least=1)
        if not (isinstance(self.alpha, (int, float)) and abs(self.alpha) < float("inf")):
            raise UserInputError(f"alpha is {self.alpha!r}", hint="use a finite number")

    def _check_variant(self) -> None:
        if self.kind == "scale" and self.zero_point != "real":
            raise UserInputError(
                f"zero_point is {self.zero_point!r} with kind 'scale'",
                hint="that kind leaves zero-points as they are: leave the option out",
            )
        for field, usual in (("init", "zeros"), ("group_size", None), ("dropout", 0.0)):
            if self.keeps_integer_zero_point and getattr(self, field) != usual:
                raise UserInputError(
                    f"{field} is {getattr(self, field)!r} with whole zero-points",
                    hint="it is for kind 'lora' with zero_point 'real'",
                )
        if self.keeps_integer_zero_point and self.rank == AUTO:
            raise UserInputError(
                "rank is 'auto' with adapters that keep zero-points whole",
                hint="what a rank gains is known for kind 'lora' with zero_point 'real'",
            )

    @property
    def keeps_integer_zero_point(self) -> bool:
        """Whether zero-points that are whole numbers stay so."""
        return self.kind == "scale" or self.zero_point == "integer"

    @property
    def scaling(self) -> float:
        """`scaling_at` the rank, where all layers have the same.

        Raises:
            UserInputError: the rank is `"auto"`.
        """
        if not isinstance(self.rank, int):
            raise UserInputError(f"rank is {self.rank!r}", hint="ask for scaling_at(rank)")
        return self.scaling_at(self.rank)

    def scaling_at(self, rank: int) -> float:
        """Alpha / rank, or alpha / √rank with rank-stabilised scaling (arXiv 2312.03732)."""
        return self.alpha / (rank**0.5 if self.use_rslora else rank)

    def pooling_factor(self, group_size: int, groups: int) -> float:
        """f, which turns the sum inside a group into this convention's pooling.

        Args:
            group_size: g, the width of a full pooling group. A shorter tail group is pooled as if
                padded with zeros, so f is the same for every group.
            groups: L, the number of pooling groups.
        """
        factors = {
            "sum": 1.0,
            "mean": 1.0 / group_size,
            "mean_times_groups": groups / group_size,
            "scaled_sum": 1.0 / math.sqrt(group_size),
        }
        return factors[self.pooling]


@dataclass(frozen=True, kw_only=True)
class ExportSpec(Spec):
    """What an exporter writes.

    Attributes:
        target: `"ort"`: GroupQuantLinear with real-valued zero-points, in layered functions, for
            ONNX Runtime with this package's library, without it, and for other runtimes.
            `"ort-stock"`: MatMulNBits with integer zero-points and one shared group-sum
            correction, for any ONNX Runtime. `"onnx"`: blocked DequantizeLinear and the same
            correction, standard operators only. The others are checkpoints of other libraries
            (docs/checkpoints.md), which take none of the options of ONNX below.
        opset: ONNX opset version of the standard domain; None takes 20, or 21 for `"onnx"`.
        accuracy_level: 0 computes in float32; 4 quantizes activations to int8, which is faster and
            errs by about 5e-3 of the output. In a file of target `"onnx"` it cannot be said: the
            runtime decides (see docs/lowering.md).
        parameter_dtype: Of scale and zero-point in target `"ort"`: `"float32"` is exact,
            `"float16"` rounds, and is smaller and faster. In checkpoints likewise; of all weights
            in target `"float"`; `"gguf"` and `"safetensors"` leave no choice.
        correction: Of target `"ort-stock"`: `"fp32"` is exact; `"digits"` makes it part of the
            kernel, as two or three digits of the codes' width, which is faster and rounds.
        fusion: How norms, rotary embeddings and attention of a transformer are written:
            `"standard"`: the operators that opset 23 has for them; `"ort"`: ONNX Runtime's own
            operators, for its releases 1.21 and 1.22, which do not have those; `"none"`: as the
            model computes them. None takes `"none"` for models without a key-value cache; with one
            `"standard"`, or with a given opset that is too low for it `"ort"`, else `"none"`.
        float_type: Of target `"gguf"`: how matrices are stored that are not on codes, `"q8_0"`,
            `"f16"`, `"bf16"` or `"f32"`; None takes for each the smallest that keeps every value.
        allow_unfolded: Export a program whose adapters are not folded (they stay in the graph), or
            one that is not quantized at all.
        overwrite: Replace an existing file.
    """

    target: str = "ort"
    opset: int | None = None
    accuracy_level: int = 0
    parameter_dtype: str = "float32"
    correction: str = "fp32"
    fusion: str | None = None
    float_type: str | None = None
    allow_unfolded: bool = False
    overwrite: bool = False

    OPSETS: ClassVar[tuple[int, ...]] = (18, 19, 20, 21, 22, 23)

    @property
    def onnx_opset(self) -> int:
        """The opset version that is written."""
        least = FUSION_OPSETS.get(self.fusion or "", 18)
        return self.opset or max(21 if self.target == "onnx" else 20, least)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the target is a checkpoint of another library, not an ONNX model."""
        return self.target in CHECKPOINT_TARGETS

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnsupportedError(
                f"there is no export target {self.target!r}",
                hint=f"use one of {', '.join(TARGETS)}",
            )
        if self.opset is not None:
            one_of("opset", self.opset, self.OPSETS)
        one_of("parameter_dtype", self.parameter_dtype, PARAMETER_DTYPES)
        one_of("correction", self.correction, CORRECTIONS)
        one_of("accuracy_level", self.accuracy_level, ACCURACY_LEVELS)
        for option, known in (("fusion", FUSIONS), ("float_type", FLOAT_TYPES)):
            if getattr(self, option) is not None:
                one_of(option, getattr(self, option), known)
        self._check_target()
        if not self.is_checkpoint:
            self._check_onnx()

    def _check_target(self) -> None:
        """Refuse options that the target does not have."""
        no_parameters = ("ort-stock", "onnx", "gguf", "safetensors")
        checkpoint = CHECKPOINT_TARGETS
        others = tuple(target for target in TARGETS if target != "ort-stock")
        no_floats = tuple(target for target in TARGETS if target != "gguf")
        for option, default, targets in (
            ("parameter_dtype", "float32", no_parameters),
            ("correction", "fp32", others),
            ("float_type", None, no_floats),
            ("opset", None, checkpoint),
            ("accuracy_level", 0, checkpoint),
            ("fusion", None, checkpoint),
            ("allow_unfolded", False, checkpoint),
        ):
            if getattr(self, option) != default and self.target in targets:
                fitting = [target for target in TARGETS if target not in targets]
                raise UserInputError(
                    f"{option} is {getattr(self, option)!r} for target {self.target}",
                    hint=f"it is an option of target {', '.join(fitting)}",
                )

    def _check_onnx(self) -> None:
        """Refuse options of ONNX that do not go together."""
        if self.onnx_opset < 21 and self.target == "onnx":
            raise UserInputError(
                f"opset is {self.opset}", hint="target onnx needs 21: DequantizeLinear in blocks"
            )
        if self.fusion is not None:
            least = FUSION_OPSETS[self.fusion]
            if self.onnx_opset < least:
                raise UserInputError(
                    f"opset is {self.opset} with fusion {self.fusion!r}",
                    hint=f"its operators are in opset {least}; fusion='none' needs none of them",
                )
            if self.fusion == "ort" and self.target == "onnx":
                raise UserInputError(
                    "fusion is 'ort' for target onnx",
                    hint="that target has standard operators only: fusion 'standard' or 'none'",
                )
        if self.accuracy_level != 0 and self.target == "onnx":
            raise UserInputError(
                f"accuracy_level is {self.accuracy_level!r} for target onnx",
                hint="a standard model cannot say it; the session does: docs/lowering.md",
            )

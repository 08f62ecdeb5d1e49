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
"""A value of `bits` and `rank`: chosen layer by layer, within a budget."""
METHODS = ("minmax", "mse", "hqq", "gptq")
"""Each loses less than the one before it, in the output of a layer."""
CALIBRATED = ("gptq",)
"""The methods that need calibration data."""
POOLINGS = ("sum", "mean", "mean_times_groups", "scaled_sum")
INITS = ("zeros", "svd")
BUDGET_UNITS = ("bits", "megabytes")
TARGETS = ("ort", "ort-stock", "onnx")
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


def _whole(field: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserInputError(f"{field} is {value!r}", hint=f"use a whole number, {least} or more")


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
        method: How scale, offset and codes are chosen. `"minmax"` rounds to the nearest of
            2^bits levels between the group's smallest and largest weight (arXiv 2309.14717, Eq. 1);
            `"mse"` searches for the range that loses least; `"hqq"` fits it half-quadratically;
            `"gptq"` (arXiv 2210.17323) needs calibration data.
        refine_offsets: Where there are calibration data, move the offsets to where the output error
            is least, given the codes and the scale. This costs nothing at run time.
        act_order: Of `"gptq"`: round the columns that are most active first; groups stay as they
            are. False: from left to right.
        damping: Of `"gptq"`: part of the mean diagonal of the second moments that is added to their
            diagonal; more is added where calibration rows are few.
        budget: Most that the weights may take with bits `"auto"`, in `budget_unit`.
        budget_unit: `"bits"`: the mean width of a code, over all weights that are quantized;
            `"megabytes"`: 10⁶ bytes of codes, scales and offsets, as this package stores them.
    """

    bits: int | str = 4
    group_size: int = 32
    method: str = "minmax"
    refine_offsets: bool = True
    act_order: bool = True
    damping: float = 0.01
    budget: float | None = None
    budget_unit: str = "bits"

    def __post_init__(self) -> None:
        if self.bits != AUTO:
            one_of("bits", self.bits, SUPPORTED_BITS)
        if not (_is_positive(self.budget) if self.bits == AUTO else self.budget is None):
            raise UserInputError(
                f"budget is {self.budget!r} with bits {self.bits!r}",
                hint="bits 'auto' takes a budget, a number above 0; other bits take none",
            )
        one_of("budget_unit", self.budget_unit, BUDGET_UNITS)
        _whole("group_size", self.group_size, least=1)
        one_of("method", self.method, METHODS)
        one_of("refine_offsets", self.refine_offsets, (True, False))
        one_of("act_order", self.act_order, (True, False))
        if not (isinstance(self.damping, float) and 0 < self.damping <= 1):
            raise UserInputError(f"damping is {self.damping!r}", hint="use e.g. 0.01, 1 at most")

    @property
    def width(self) -> int:
        """Bits, where all weights have the same.

        Raises:
            UserInputError: they are `"auto"`.
        """
        if not isinstance(self.bits, int):
            raise UserInputError(f"bits are {self.bits!r}", hint="assign-bits chooses them")
        return self.bits


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

    def __post_init__(self) -> None:
        if self.rank == AUTO:
            _whole("rank_budget, with rank 'auto',", self.rank_budget, least=1)
        else:
            _whole("rank", self.rank, least=1)
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
        _whole("seed", self.seed, least=0)
        if self.group_size is not None:
            _whole("adapter group_size", self.group_size, least=1)
        if not (isinstance(self.alpha, (int, float)) and abs(self.alpha) < float("inf")):
            raise UserInputError(f"alpha is {self.alpha!r}", hint="use a finite number")

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
            correction, standard operators only.
        opset: ONNX opset version of the standard domain; None takes 20, or 21 for `"onnx"`.
        accuracy_level: 0 computes in float32; 4 quantizes activations to int8, which is faster and
            errs by about 5e-3 of the output. In a file of target `"onnx"` it cannot be said: the
            runtime decides (see docs/lowering.md).
        parameter_dtype: Of scale and zero-point in target `"ort"`: `"float32"` is exact,
            `"float16"` rounds, and is smaller and faster.
        correction: Of target `"ort-stock"`: `"fp32"` is exact; `"digits"` makes it part of the
            kernel, as two or three digits of the codes' width, which is faster and rounds.
        fusion: How norms, rotary embeddings and attention of a transformer are written:
            `"standard"`: the operators that opset 23 has for them; `"ort"`: ONNX Runtime's own
            operators, for its releases 1.21 and 1.22, which do not have those; `"none"`: as the
            model computes them. None takes `"none"` for models without a key-value cache; with one
            `"standard"`, or with a given opset that is too low for it `"ort"`, else `"none"`.
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
    allow_unfolded: bool = False
    overwrite: bool = False

    OPSETS: ClassVar[tuple[int, ...]] = (18, 19, 20, 21, 22, 23)

    @property
    def onnx_opset(self) -> int:
        """The opset version that is written."""
        least = FUSION_OPSETS.get(self.fusion or "", 18)
        return self.opset or max(21 if self.target == "onnx" else 20, least)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnsupportedError(
                f"there is no export target {self.target!r}",
                hint=f"use one of {', '.join(TARGETS)}",
            )
        if self.opset is not None:
            one_of("opset", self.opset, self.OPSETS)
        if self.onnx_opset < 21 and self.target == "onnx":
            raise UserInputError(
                f"opset is {self.opset}", hint="target onnx needs 21: DequantizeLinear in blocks"
            )
        if self.fusion is not None:
            one_of("fusion", self.fusion, FUSIONS)
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
        one_of("parameter_dtype", self.parameter_dtype, PARAMETER_DTYPES)
        one_of("correction", self.correction, CORRECTIONS)
        for field, default, target in (
            ("parameter_dtype", "float32", "ort"),
            ("correction", "fp32", "ort-stock"),
        ):
            if getattr(self, field) != default and self.target != target:
                raise UserInputError(
                    f"{field} is {getattr(self, field)!r} for target {self.target}",
                    hint=f"it is an option of target {target}",
                )
        if self.accuracy_level != 0 and self.target == "onnx":
            raise UserInputError(
                f"accuracy_level is {self.accuracy_level!r} for target onnx",
                hint="a standard model cannot say it; the session does: docs/lowering.md",
            )
        one_of("accuracy_level", self.accuracy_level, ACCURACY_LEVELS)

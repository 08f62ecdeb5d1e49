"""A pooled low-rank adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qalora_compile.config.base import AUTO, LARGEST_SEED, Spec, check_int, one_of
from qalora_compile.config.quant import ZERO_POINTS
from qalora_compile.errors import UserInputError

POOLINGS = ("sum", "mean", "mean_times_groups", "scaled_sum")
INITS = ("zeros", "svd")
LORA, AFFINE, QAT = "lora", "affine", "qat"
ADAPTER_KINDS = (LORA, "scale", AFFINE, QAT)
AFFINE_KINDS = (AFFINE, QAT)

Pooling = Literal["sum", "mean", "mean_times_groups", "scaled_sum"]


@dataclass(frozen=True, kw_only=True)
class AdapterSpec(Spec):
    """A pooled low-rank adapter: y += scaling · f · (S(x) Aᵀ) Bᵀ, S the sum of x inside a group.

    Attributes:
        rank: r, the inner width of A: [r, L] and B: [N, r]; or `"auto"`, a rank for each layer by
            its gain, within `rank_budget`.
        alpha: Numerator of `scaling`, alpha / rank (or alpha / √rank with `use_rslora`).
        pooling: The convention that defines f: `"sum"` 1 (the paper's Algorithm 1), `"mean"` 1/g
            (the authors' code), `"mean_times_groups"` L/g (PEFT's `use_qalora`), `"scaled_sum"`
            1/√g (independent inputs keep their variance).
        group_size: Width of a pooling group; None takes the quantization group. It must be a
            multiple of the quantization group, or the adapter could not fold.
        use_rslora: Scale by alpha / √rank.
        dropout: In training, each number of the pooled input of an adapter is dropped with this
            probability, and the others are scaled up. It does not affect evaluation and folding.
        seed: Seed of A's initial values.
        init: `"zeros"`: B starts at zero, so the function does not change. `"svd"`: B A starts as
            the best correction of rank r of the quantization error that folds.
        rank_budget: Largest number of parameters of all adapters together, with rank `"auto"`.
        kind: `"lora"`: the update of Algorithm 1, which moves zero-points. `"scale"`: only the
            scales are trained, scale' = scale · (1 + scaling · f · B A), and zero-points stay
            integers. `"affine"`: zero-points by Algorithm 1 and each scale by a factor of its own.
            `"qat"`: as `"affine"`, and the codes, by straight-through rounding.
        zero_point: For kind `"lora"`. `"integer"`: the moved zero-points are rounded to integers
            during training, so that the deployed model is the trained one.

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
                hint="that kind does not change zero-points: omit the option",
            )
        for name in ("zero_point", "dropout") if self.kind in AFFINE_KINDS else ():
            if getattr(self, name) not in ("real", 0):
                raise UserInputError(
                    f"{name} is {getattr(self, name)!r} with kind {self.kind!r}",
                    hint="it is for kind 'lora'",
                )
        for field, usual in (("init", "zeros"), ("group_size", None), ("dropout", 0.0)):
            if self.keeps_integer_zero_point and getattr(self, field) != usual:
                raise UserInputError(
                    f"{field} is {getattr(self, field)!r} with integer zero-points",
                    hint="it is for kind 'lora' with zero_point 'real'",
                )
        if self.keeps_integer_zero_point and self.rank == AUTO:
            raise UserInputError(
                "rank is 'auto' with adapters that keep zero-points integers",
                hint="what a rank gains is known for kind 'lora' with zero_point 'real'",
            )

    @property
    def keeps_integer_zero_point(self) -> bool:
        """Whether integer zero-points stay integers."""
        return self.kind == "scale" or self.zero_point == "integer"

    @property
    def scaling(self) -> float:
        """`scaling_at` the rank, if all layers have the same.

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
        """f, which converts the sum inside a group to this convention's pooling.

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

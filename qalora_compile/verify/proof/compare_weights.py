"""Compares two linear maps by coefficient, and bounds the effect of differences on outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import Array
from qalora_compile.verify.proof.weights.linear_map import (
    INT8,
    THREE_DIGITS,
    TWO_DIGITS,
    Linear,
    NotLinearError,
    Rows,
)

_CHUNK = 1 << 18
"""How many coefficients are decoded at a time: a dozen arrays of 2 MB stay in a core's cache."""
_WHOLE_BYTES = 8
"""Rows are taken in multiples of this many, so that codes of some columns begin with a byte."""
_UNIT = 2.0**-24
"""u of float32."""
_DIGIT_BLOCK = 32
DIGITS_ROUNDING = {
    TWO_DIGITS: math.sqrt(_DIGIT_BLOCK) / 32_000,
    THREE_DIGITS: math.sqrt(_DIGIT_BLOCK) * 2.0**-21,
}
"""Bounds ‖x − x̂‖₂ / ‖x‖₂ of GroupQuantLinear (docs/reference/operators.md).

Digits are at most this part of the largest magnitude m of a block from each of its at most 32
values; and m ≤ ‖block‖₂. Blocks with m below 2^-100, which count as zero, are left out."""
RULE = (
    "entry by entry in float64: |W_a − W_b| ≤ r_a + r_b, where r is what storing explains: "
    "u·|offset| for an offset that was folded, scale·u·|zero_point| for a real zero-point, u·|C| "
    "for a correction (u = 2^-24, or 2^-11 in float16, plus half the smallest number of the type), "
    "half a step of the last digit of a correction in digits, and 2^-48 of the weight's parts for "
    "the decoder's own arithmetic; codes, scales and biases have no tolerance"
)


@dataclass(frozen=True)
class Coefficients:
    """The differences between two effective weights and biases.

    Attributes:
        max_abs: Largest difference of two weights.
        max_ratio: Largest ratio of a difference to the storage rounding there; unequal if above 1.
        worst: (row, column) of that ratio; for experts (expert, row, column).
        frobenius: ‖ΔW‖_F, so that ‖Δy‖₂ ≤ ‖ΔW‖_F ‖x‖₂ + ‖Δb‖₂ for every x, in exact arithmetic.
        operator: A bound on the largest singular value of ΔW: min(‖ΔW‖_F, √(‖ΔW‖₁ ‖ΔW‖_∞)).
        weight_max, weight_frobenius: Largest absolute value and norm of the reference's weight.
        bias_max_abs: Largest difference of two biases, for which there is no tolerance.
        bias_norm: ‖Δb‖₂.
        float32: Bounds |computed y − exact y| in float32, for either map and any order of
            summation: ‖·‖₂ ≤ float32 · ‖x‖₂ + γ‖b‖₂; None for int8 activations. For operators
            that split x into digits it contains `DIGITS_ROUNDING` · ‖W‖_F.
        terms: n of γ_n in that bound.
        coarse: The largest storage rounding relative to the scale of its group.
    """

    max_abs: float
    max_ratio: float
    worst: tuple[int, ...]
    frobenius: float
    operator: float
    weight_max: float
    weight_frobenius: float
    bias_max_abs: float
    bias_norm: float
    float32: float | None
    terms: int
    coarse: float

    @property
    def equal(self) -> bool:
        """Whether every difference is within the storage rounding."""
        return self.max_ratio <= 1 and self.bias_max_abs == 0


def compare_linears(a: Linear, b: Linear) -> Coefficients:
    """Compare two linear maps, a block of rows at a time.

    Raises:
        NotLinearError: their shapes differ, or a matrix does not fit its operand.
    """
    if (a.n, a.k, a.experts) != (b.n, b.k, b.experts):
        raise NotLinearError(f"the shapes {_shape(a)} and {_shape(b)} differ")
    sums = _Sums(a.k)
    for expert in range(a.experts or 1):
        sums.begin()
        step = max(1, _CHUNK // max(1, a.k) // _WHOLE_BYTES) * _WHOLE_BYTES
        for start in range(0, a.n, step):
            part, which = slice(start, min(start + step, a.n)), expert if a.experts else -1
            sums.add(a.rows(part, which), b.rows(part, which), start, which)
    bias = a.biases() - b.biases()
    terms = max(a.terms, b.terms)
    notes = {*a.notes, *b.notes}
    moved = max((DIGITS_ROUNDING.get(note, 0.0) for note in notes), default=0.0)
    gamma = terms * _UNIT / (1 - terms * _UNIT)
    norm = math.sqrt(sums.weight_square) + math.sqrt(sums.square)  # of either weight
    computed = gamma * (1 + moved) * math.sqrt(sums.size_square) + moved * norm
    return Coefficients(
        max_abs=sums.max_abs,
        max_ratio=sums.max_ratio,
        worst=sums.worst,
        frobenius=math.sqrt(sums.square),
        operator=sums.operator,
        weight_max=sums.weight_max,
        weight_frobenius=math.sqrt(sums.weight_square),
        bias_max_abs=float(np.abs(bias).max()),
        bias_norm=float(np.linalg.norm(bias)),
        float32=None if INT8 in notes else computed,
        terms=terms,
        coarse=sums.coarse,
    )


def _shape(linear: Linear) -> str:
    lead = f"{linear.experts}×" if linear.experts else ""
    return f"{lead}{linear.n}×{linear.k}"


class _Sums:
    """Values accumulated over the rows."""

    def __init__(self, k: int) -> None:
        self._k = k
        self.max_abs = self.max_ratio = self.square = self.operator = 0.0
        self.weight_max = self.weight_square = self.size_square = self.coarse = 0.0
        self.worst: tuple[int, ...] = ()

    def begin(self) -> None:
        """Begin a matrix."""
        self._columns = np.zeros(self._k)
        self._row, self._square = 0.0, 0.0

    def add(self, a: Rows, b: Rows, start: int, expert: int) -> None:
        """Add a block of rows of both maps."""
        difference = np.abs(a.weight - b.weight)
        self._ratio(difference, a.radius + b.radius, start, expert)
        self.max_abs = max(self.max_abs, float(difference.max()))
        square = float(np.square(difference).sum())
        self.square, self._square = self.square + square, self._square + square
        self._columns += difference.sum(0)
        self._row = max(self._row, float(difference.sum(1).max()))
        product = math.sqrt(float(self._columns.max()) * self._row)
        self.operator = max(self.operator, min(math.sqrt(self._square), product))
        self.coarse = max(self.coarse, a.coarse + b.coarse)
        self.weight_max = max(self.weight_max, float(np.abs(a.weight).max()))
        self.weight_square += float(np.square(a.weight).sum())
        self.size_square += float(np.square(np.maximum(a.size, b.size)).sum())

    def _ratio(self, difference: Array, radius: Array, start: int, expert: int) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(difference == 0, 0.0, difference / radius)
        ratio = np.where(np.isnan(ratio), np.inf, ratio)  # a NaN is a difference
        place: Any = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        if float(ratio[place]) > self.max_ratio or not self.worst:
            self.max_ratio = float(ratio[place])
            lead = () if expert < 0 else (expert,)
            self.worst = (*lead, int(place[0]) + start, int(place[1]))

"""Searches the range of each group that minimizes the error of rounding to the nearest level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.groups import round_to_nearest, split_columns, split_groups

_COARSE = (0.0, 0.15, 0.3, 0.45, 0.6)
"""Fractions of half a group's range that are cut off at an end."""
_FINE = (-0.1, -0.05, 0.0, 0.05, 0.1)
"""Changes of the best coarse fraction."""


@dataclass
class UnitGroups:
    """Groups mapped to the range 0 … 1, so that computations do not overflow.

    Attributes:
        values: `[n, L, g]` float32; 0 in a group of equal weights.
        importance: Weight of each column in the error, `[L, g]` float32; 0 for padding of the tail.
        low: The original value of 0, `[n, L, 1]` float64.
        span: The original value of 1, minus `low`.
        levels: 2^bits − 1.
    """

    values: Tensor
    importance: Tensor
    low: Tensor
    span: Tensor
    levels: int

    @classmethod
    def of(cls, rows: Tensor, spec: QuantSpec, importance: Tensor | None) -> UnitGroups:
        """The groups of some rows of a weight; `importance` `[K]`, or None for 1."""
        grouped = split_groups(rows, spec.group)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        span = high - low
        values = (grouped - low) / torch.where(span == 0, torch.ones_like(span), span)
        if importance is None:
            importance = rows.new_ones(rows.shape[1])
        columns = split_columns(importance.float(), spec.group)
        return cls(values.float(), columns, low, span, 2**spec.width - 1)

    def codes(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The nearest codes, as float32 `[n, L, g]`, at a unit scale and offset `[n, L, 1]`."""
        return ((self.values - offset) / scale).round_().clamp_(0, self.levels)

    def error(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The squared error of each group, weighted by importance, `[n, L, 1]`."""
        off = self.codes(scale, offset).mul_(scale).add_(offset).sub_(self.values)
        return (off.square_() * self.importance).sum(-1, keepdim=True)

    def restore(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of the original weights, float64 `[n, L]`."""
        found = scale.double() * self.span, self.low + offset.double() * self.span
        return found[0][..., 0], found[1][..., 0]


def quantize_mse(weight: Tensor, spec: QuantSpec) -> GroupAffine:
    """Cut each group's range at both ends if that lowers the squared error of its weights.

    The full range is also tried, so the error is never larger than with min-max.

    Args:
        weight: `[N, K]`, floating and finite.
        spec: bits and group_size.
    """

    def parameters(rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = UnitGroups.of(rows, spec, None)
        return groups.restore(*search_range(groups))

    return round_to_nearest(weight, spec, parameters)


def search_range(groups: UnitGroups) -> tuple[Tensor, Tensor]:
    """Unit scale and offset `[n, L, 1]` of the range with the least weighted squared error."""
    zero = torch.zeros_like(groups.low, dtype=torch.float32)
    best = torch.full_like(zero, torch.inf)
    low, high = zero, zero
    for cut in (_coarse, _fine):
        for cut_low, cut_high in cut(low, high):
            offset = cut_low / 2
            scale = (1 - cut_high / 2 - offset) / groups.levels
            error = groups.error(scale, offset)
            better = error < best
            best = torch.where(better, error, best)
            low, high = torch.where(better, cut_low, low), torch.where(better, cut_high, high)
    return (1 - high / 2 - low / 2) / groups.levels, low / 2


def _coarse(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for a in _COARSE:
        for b in _COARSE:
            yield torch.full_like(low, a), torch.full_like(high, b)


def _fine(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Variations of the best coarse cuts."""
    for a in _FINE:
        for b in _FINE:
            yield (low + a).clamp_min(0), (high + b).clamp_min(0)


def fit_line(
    codes: Tensor, groups: UnitGroups, target: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Unit scale and offset that minimize `Σ importance · (scale · q + offset − target)²`.

    Args:
        codes: q, `[n, L, g]`.
        groups: Their importance is used.
        target: `[n, L, g]`.
        scale: `[n, L, 1]`, kept if a group's codes are all equal or the fit is not positive.
    """
    total = groups.importance.sum(-1, keepdim=True)
    share = groups.importance / torch.where(total == 0, torch.ones_like(total), total)
    q, t = (codes * share).sum(-1, keepdim=True), (target * share).sum(-1, keepdim=True)
    deviation = codes - q
    variance = (deviation.square() * share).sum(-1, keepdim=True)
    slope = (deviation * (target - t) * share).sum(-1, keepdim=True) / variance
    slope = torch.where((variance > 0) & (slope > 0), slope, scale)
    return slope, t - slope * q

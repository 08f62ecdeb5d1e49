"""GPTQ: round column by column, and let the columns to come make up for each error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine, group_count
from qalora_compile.quantizers.base import Chosen
from qalora_compile.quantizers.damping import factor
from qalora_compile.quantizers.groups import round_to_nearest, storage_dtype
from qalora_compile.quantizers.mse import UnitGroups, fit_line, search_range
from qalora_compile.quantizers.statistics import ActivationStatistics

_BLOCK = 128
"""Columns whose errors are passed on to the rest of the weight together."""
_FITS = 5
_NOISE = 0.25
"""Least damping, times K / rows: what few rows say of how columns go together is mostly noise."""


def quantize_gptq(weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics) -> Chosen:
    """Minimise the output error `D H Dᵀ` greedily, D the change of the weights, H `statistics`.

    Frantar et al., "GPTQ" (arXiv 2210.17323), Algorithm 1: each column is rounded, and its error,
    divided by the diagonal of U, is taken off the columns that follow; `Uᵀ U = H⁻¹`.

    Scale and offset of a group are those that lose least, each column weighted by the diagonal of
    H (a range search, then least squares on scale and offset). With `spec.act_order`, they are
    chosen first, on the weight as it is, and columns are taken in descending order of that
    diagonal: where errors cost most, most columns are left to make up for them. A column belongs to
    its own group all the while, so groups stay contiguous, as folding needs, and no permutation is
    stored or applied to x. Without, columns are taken from left to right and each group's scale and
    offset are chosen when it is reached, on what the columns before have left of it.

    Args:
        weight: `[N, K]`, floating and finite.
        spec: bits, group_size, act_order and damping.
        statistics: Of the layer's input.

    Raises:
        UserInputError: the second moments cannot be factored.
    """
    moment = statistics.moment
    if not float(moment.diagonal().sum()) > 0:
        return Chosen(
            round_to_nearest(weight, spec, _parameters(spec, None)),
            ("the calibration inputs are all zero: rounded to the nearest",),
        )
    k = weight.shape[1]
    wanted = max(spec.damping, min(1.0, _NOISE * k / statistics.rows))
    found = factor(moment, wanted)
    notes = [f"damping raised to {found.damping:.2g}"] * (found.damping > spec.damping)
    if statistics.rows < k:
        notes.append(f"{statistics.rows} input rows for {k} columns")
    dead = int((moment.diagonal() == 0).sum())
    notes += [f"{dead} columns are never active"] * bool(dead)
    importance = moment.diagonal() + found.damping * moment.diagonal().mean()
    order = (
        torch.argsort(importance, descending=True, stable=True)
        if spec.act_order
        else torch.arange(k)
    )
    damped = (found.lower @ found.lower.T)[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rounding = _Rounding(weight, spec, importance)
    return Chosen(rounding.run(order, upper), tuple(notes))


def _parameters(
    spec: QuantSpec, importance: Tensor | None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Scale and offset of rows: a range search, then least squares."""

    def parameters(rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = UnitGroups.of(rows, spec, importance)
        scale, offset = search_range(groups)
        best, best_error = (scale, offset), groups.error(scale, offset)
        for _ in range(_FITS):
            scale, offset = fit_line(groups.codes(scale, offset), groups, groups.values, scale)
            error = groups.error(scale, offset)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (
                torch.where(better, scale, best[0]),
                torch.where(better, offset, best[1]),
            )
        return groups.restore(*best)

    return parameters


class _Rounding:
    """Columns rounded one after the other.

    Arithmetic is float32 (float64 for a float64 weight) on weights divided by the largest of them.

    Args:
        weight: `[N, K]`.
        spec: bits, group_size, act_order.
        importance: Of each column, `[K]`.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, importance: Tensor) -> None:
        n, k = weight.shape
        self._spec, self._importance = spec, importance
        self._storage = storage_dtype(weight)
        largest = weight.abs().max().double()
        self._unit = torch.where(largest == 0, torch.ones_like(largest), largest)
        self._rest = (weight.double() / self._unit).to(self._storage)
        self._codes = torch.zeros(n, k, dtype=torch.uint8)
        shape = n, group_count(k, spec.group_size)
        self._scale, self._offset = (weight.new_zeros(shape, dtype=self._storage) for _ in "so")
        if spec.act_order:
            whole = round_to_nearest(weight, spec, _parameters(spec, importance))
            self._scale, self._offset = whole.scale, whole.offset

    def run(self, order: Tensor, upper: Tensor) -> GroupAffine:
        """Round the columns in `order`; `upper` is U, for columns in that order."""
        size, k = self._spec.group_size, len(order)
        block = size * max(1, _BLOCK // size)  # a group does not end in another block
        rest, upper = self._rest[:, order], upper.to(self._storage)
        for start in range(0, k, block):
            stop = min(start + block, k)
            errors = torch.zeros(rest.shape[0], stop - start, dtype=rest.dtype)
            for column in range(start, stop):
                place = int(order[column])
                if not self._spec.act_order and column % size == 0:
                    self._choose(rest[:, column : column + size], column)
                error = self._round(rest[:, column], place) / upper[column, column]
                rest[:, column + 1 : stop].addr_(error, upper[column, column + 1 : stop], alpha=-1)
                errors[:, column - start] = error
            rest[:, stop:] -= errors @ upper[start:stop, stop:]
        spec = self._spec
        return GroupAffine(self._codes, self._scale, self._offset, spec.width, spec.group_size)

    def _choose(self, columns: Tensor, first: int) -> None:
        """Scale and offset of the group that begins at the column `first`."""
        spec, group = self._spec, first // self._spec.group_size
        importance = self._importance[first : first + columns.shape[1]]
        values = columns.double() * self._unit
        parameters = _parameters(spec, importance)(values)
        for stored, found in zip((self._scale, self._offset), parameters, strict=True):
            stored[:, group] = found[:, 0].to(self._storage)

    def _round(self, column: Tensor, place: int) -> Tensor:
        """Choose the codes of the column `place` of the weight; gives its error."""
        group = place // self._spec.group_size
        scale = (self._scale[:, group].double() / self._unit).to(self._storage)
        offset = (self._offset[:, group].double() / self._unit).to(self._storage)
        level = ((column - offset) / scale).round().clamp(0, 2**self._spec.width - 1)
        codes = torch.where(scale == 0, torch.zeros_like(level), level)
        self._codes[:, place] = codes.to(torch.uint8)
        return column - (codes * scale + offset)

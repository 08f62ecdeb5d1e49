"""GPTQ: rounds column by column and compensates each error in the following columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine, group_count
from qalora_compile.quantizers.base import QuantizedWeight
from qalora_compile.quantizers.damping import factor
from qalora_compile.quantizers.groups import round_to_nearest, storage_dtype
from qalora_compile.quantizers.mse import UnitGroups, fit_line, search_range
from qalora_compile.quantizers.statistics import ActivationStatistics

_BLOCK = 128
"""Number of columns whose errors are applied to the rest of the weight together."""
_FITS = 5
_NOISE = 0.25
"""Least damping is this times K / rows, because correlations from few rows are mostly noise."""


def quantize_gptq(
    weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics
) -> QuantizedWeight:
    """Minimize the output error `D H Dᵀ` greedily, with D the weight change and H the moments.

    Frantar et al., "GPTQ" (arXiv 2210.17323), Algorithm 1: each column is rounded, and its error,
    divided by the diagonal of U, is subtracted from the following columns; `Uᵀ U = H⁻¹`.

    Scale and offset of a group minimize the error with each column weighted by the diagonal of H (a
    range search, then least squares on scale and offset). With `spec.act_order`, they are chosen
    first, on the original weight, and columns are rounded in descending order of that diagonal, so
    that most columns remain to compensate the costliest errors. Columns stay in their groups, which
    folding needs to be contiguous, and no permutation is stored or applied to x. Without it,
    columns are rounded from left to right, and a group's scale and offset are chosen when it is
    reached, on its values with the compensation so far.

    Args:
        weight: `[N, K]`, floating and finite.
        spec: bits, group_size, act_order and damping.
        statistics: Statistics of the layer's input.

    Raises:
        UserInputError: the second moments cannot be factored.
    """
    moment = statistics.moment
    if not float(moment.diagonal().sum()) > 0:
        return QuantizedWeight(
            round_to_nearest(weight, spec, _parameters(spec, None)),
            ("the calibration inputs are all zero: rounded to the nearest",),
        )
    k, diagonal = weight.shape[1], moment.diagonal()
    order = torch.argsort(diagonal, descending=True) if spec.act_order else torch.arange(k)
    wanted = max(spec.damping, min(1.0, _NOISE * k / statistics.rows))
    found = factor(moment[order][:, order], wanted)
    notes = [f"damping raised to {found.damping:.2g}"] * (found.damping > spec.damping)
    if statistics.rows < k:
        notes.append(f"{statistics.rows} input rows for {k} columns")
    dead = int((diagonal == 0).sum())
    notes += [f"{dead} columns are never active"] * bool(dead)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(found.lower), upper=True)
    importance = diagonal + found.damping * diagonal.mean()
    rounding = _Rounding(weight, spec, importance)
    return QuantizedWeight(rounding.run(order, upper), tuple(notes))


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
    """Rounds columns one after the other.

    Arithmetic is float32 (float64 for a float64 weight) on weights divided by the largest of them.
    They are transposed, so that columns are contiguous in memory.

    Args:
        weight: `[N, K]`.
        spec: Its bits, group_size and act_order are used.
        importance: Importance of each column, `[K]`.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, importance: Tensor) -> None:
        n, k = weight.shape
        self._spec, self._importance = spec, importance
        self._storage = storage_dtype(weight)
        largest = weight.abs().max().double()
        self._unit = torch.where(largest == 0, torch.ones_like(largest), largest)
        self._rest = self._in_units(weight).T.contiguous()
        self._codes = torch.zeros(k, n, dtype=torch.uint8)
        groups = group_count(k, spec.group)
        self._scale, self._offset = (torch.zeros(n, groups, dtype=self._storage) for _ in "so")
        self._unit_scale, self._unit_offset = (self._rest.new_zeros(groups, n) for _ in "so")
        if spec.act_order:
            rounded = round_to_nearest(weight, spec, _parameters(spec, importance))
            self._store(slice(None), rounded.scale, rounded.offset)

    def run(self, order: Tensor, upper: Tensor) -> GroupAffine:
        """Round the columns in `order`; `upper` is U, for columns in that order."""
        spec, k = self._spec, len(order)
        places: list[int] = order.tolist()
        block = spec.group * max(1, _BLOCK // spec.group)  # blocks end at group boundaries
        rest, upper = self._rest[order], upper.to(self._storage)
        pivots: list[float] = upper.diagonal().tolist()
        for start in range(0, k, block):
            stop = min(start + block, k)
            errors = rest.new_zeros(stop - start, rest.shape[1])
            for column in range(start, stop):
                if not spec.act_order and column % spec.group == 0:
                    self._choose(rest[column : column + spec.group].T, column)
                error = self._round(rest[column], places[column]).div_(pivots[column])
                rest[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
                errors[column - start] = error
            rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        codes = self._codes.T.contiguous()
        return GroupAffine(codes, self._scale, self._offset, spec.width, spec.group)

    def _in_units(self, values: Tensor) -> Tensor:
        return (values.double() / self._unit).to(self._storage)

    def _store(self, groups: slice, scale: Tensor, offset: Tensor) -> None:
        """Store scale and offset `[N, _]` of some groups, also in units of the largest weight."""
        self._scale[:, groups], self._offset[:, groups] = scale, offset
        self._unit_scale[groups] = self._in_units(self._scale[:, groups]).T
        self._unit_offset[groups] = self._in_units(self._offset[:, groups]).T

    def _choose(self, columns: Tensor, first: int) -> None:
        """Choose scale and offset of the group that begins at the column `first`."""
        spec, group = self._spec, first // self._spec.group
        importance = self._importance[first : first + columns.shape[1]]
        values = columns.double() * self._unit
        self._store(slice(group, group + 1), *_parameters(spec, importance)(values))

    def _round(self, column: Tensor, place: int) -> Tensor:
        """Choose the codes of the column `place` of the weight; returns its error."""
        group = place // self._spec.group
        scale, offset = self._unit_scale[group], self._unit_offset[group]
        level = ((column - offset) / scale).round_().clamp_(0, 2**self._spec.width - 1)
        level.nan_to_num_(0.0)  # for a group of equal weights
        self._codes[place] = level.to(torch.uint8)
        return column - level.mul_(scale).add_(offset)

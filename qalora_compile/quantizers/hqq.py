"""Half-quadratic quantization: ranges that are robust against outlier weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.base import QuantizedWeight
from qalora_compile.quantizers.groups import round_to_nearest
from qalora_compile.quantizers.mse import UnitGroups, fit_line, quantize_mse, search_range
from qalora_compile.quantizers.refine import refine_offset
from qalora_compile.quantizers.statistics import ActivationStatistics

_NORM = 0.7
_BETA, _GROWTH = 1.0, 1.05
_ITERATIONS = 5
_SMALLEST = 1e-6
"""Lower bound of a residual before it is raised to a negative power."""


def quantize_hqq(
    weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None = None
) -> QuantizedWeight:
    """Minimize `Σ |w − (scale · q + offset)|^p`, p = 0.7, by half-quadratic splitting.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): an
    auxiliary e absorbs the outliers, `e = shrink(w − scale · q − offset)`, and `w − e` is fitted in
    closed form; the two steps alternate. Here both scale and offset, which are real, are fitted,
    starting from the range of `mse`: starting from min-max, as published, results in a larger
    output error than `mse` (docs/design/quantizers.md). A group keeps the best fit among those
    whose squared error is no larger than that of the range.

    A smaller error of the weights can cause a larger error of the layer's output. With
    `statistics`, each row of the weight keeps the better of the fit and the result of `mse` by the
    output error, after refinement if `spec` asks for it. On these rows of x, no row of the weight
    is therefore worse than with `mse`.

    Args:
        weight: `[N, K]`, floating and finite.
        spec: bits, group_size and refine_offsets.
        statistics: Statistics of the layer's input, if available.
    """

    def parameters(rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = UnitGroups.of(rows, spec, None)
        return groups.restore(*_half_quadratic(groups, *search_range(groups)))

    fitted = round_to_nearest(weight, spec, parameters)
    if statistics is None:
        return QuantizedWeight(fitted)
    ranged = quantize_mse(weight, spec)
    fit_error, range_error = (
        _row_errors(weight, affine, spec, statistics) for affine in (fitted, ranged)
    )
    fits = (fit_error <= range_error)[:, None]
    codes = torch.where(fits, fitted.codes, ranged.codes)
    scale = torch.where(fits, fitted.scale, ranged.scale)
    offset = torch.where(fits, fitted.offset, ranged.offset)
    return QuantizedWeight(GroupAffine(codes, scale, offset, spec.width, spec.group))


def _row_errors(
    weight: Tensor, affine: GroupAffine, spec: QuantSpec, statistics: ActivationStatistics
) -> Tensor:
    """The mean squared output error of each row of a weight, `[N]`."""
    if spec.refine_offsets:
        affine, _ = refine_offset(weight, affine, statistics)
    return statistics.row_errors(weight.double() - affine.dequantize().double())


def _half_quadratic(groups: UnitGroups, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Unit scale and offset `[n, L, 1]`, starting from the given ones."""
    best = torch.full_like(scale, torch.inf)
    most = groups.error(scale, offset)
    best_scale, best_offset, beta = scale, offset, _BETA
    for _ in range(_ITERATIONS + 1):
        codes = groups.codes(scale, offset)
        residual = groups.values - (codes * scale + offset)
        size = residual.abs()
        norm = (size.pow(_NORM) * groups.importance).sum(-1, keepdim=True)
        squares = (size.square() * groups.importance).sum(-1, keepdim=True)
        better = (norm < best) & (squares <= most)
        best = torch.where(better, norm, best)
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
        steps = size / scale  # β is relative to a step, which makes it scale-invariant
        kept = (steps - steps.clamp_min(_SMALLEST).pow(_NORM - 1) / beta).clamp_min(0)
        outlier = residual.sign() * kept * scale
        scale, offset = fit_line(codes, groups, groups.values - outlier, scale)
        beta *= _GROWTH
    return best_scale, best_offset

"""Offsets that minimise a layer's output error, given its codes and scale.

Offsets are real numbers here, so a better one costs nothing at run time.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.damping import factor
from qalora_compile.quantizers.statistics import ActivationStatistics

DAMPING = 1e-4
"""Of the mean diagonal of the moments of the group sums."""


def pooled_residual(
    change: Tensor,
    statistics: ActivationStatistics,
    group_size: int,
    *,
    damping: float = DAMPING,
) -> Tensor:
    """E, `[N, L]`: what, added to each group of a layer's weights, best makes up for a change.

    E minimises the mean of `‖x Dᵀ − S(x) Eᵀ‖² + λ ‖E‖²` over the calibration rows, which holds
    where `E (M + λ) = D Xᵀ` with M, the mean of `S(x) S(x)ᵀ`, and X, the mean of `S(x) xᵀ`. λ is
    `damping` times the mean diagonal of M. The output error after it is never larger than before,
    for any λ, and a group whose inputs are all zero gets 0.

    Args:
        change: D = W − Wq, `[N, K]`.
        statistics: Of the layer's input.
        group_size: g; L = ceil(K / g).
        damping: Larger ones trust few calibration rows less.

    Returns:
        float64.
    """
    moment, cross = statistics.pooled(group_size)
    right = change.double() @ cross.T
    if not float(moment.diagonal().sum()) > 0:
        return torch.zeros_like(right)
    lower = factor(moment, damping).lower
    return torch.cholesky_solve(right.T, lower).T


def refine_offset(
    weight: Tensor, affine: GroupAffine, statistics: ActivationStatistics
) -> GroupAffine:
    """The same codes and scale with the offset that minimises the output error.

    Args:
        weight: W, `[N, K]`.
        affine: W quantized.
        statistics: Of the layer's input.
    """
    wide = dataclasses.replace(affine, scale=affine.scale.double(), offset=affine.offset.double())
    residual = pooled_residual(weight.double() - wide.dequantize(), statistics, affine.group_size)
    return dataclasses.replace(affine, offset=(wide.offset + residual).to(affine.offset.dtype))

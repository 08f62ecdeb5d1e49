"""Offsets that minimize a layer's output error, given its codes and scale.

Offsets are real numbers, so better ones have no run-time cost.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.damping import factor
from qalora_compile.quantizers.statistics import ActivationStatistics

DAMPING = 1e-4
"""Least damping, relative to the mean diagonal of the moments of the group sums."""
_NOISE = 8.0
"""Least damping is this times L / rows: correlations from few rows are mostly noise, and offsets
fitted to it lose more on other rows than they gain (docs/design/quantizers.md)."""


@dataclass(frozen=True)
class PooledMoments:
    """Second moments of the group sums S(x), damped and factored.

    Attributes:
        lower: The Cholesky factor of M + λ, M the mean of `S(x) S(x)ᵀ`, `[L, L]`; the identity
            where all inputs are zero.
        cross: X, the mean of `S(x) xᵀ`, `[L, K]`.
        damping: λ as a part of the mean diagonal of M.
        notes: Notes on few rows, on damping and on inputs that are all zero.
    """

    lower: Tensor
    cross: Tensor
    damping: float
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, statistics: ActivationStatistics, group_size: int, damping: float | None = None
    ) -> PooledMoments:
        """Factor the moments of a layer's input.

        Args:
            statistics: Statistics of the layer's input.
            group_size: Group size g; L = ceil(K / g).
            damping: None takes `max(DAMPING, 8 L / rows)`, so that fewer rows have less influence.

        Raises:
            UserInputError: they cannot be factored.
        """
        moment, cross = statistics.pooled(group_size)
        groups, rows = len(moment), statistics.rows
        if not float(moment.diagonal().sum()) > 0:
            note = "the calibration inputs are all zero: offsets stay"
            return cls(torch.eye(groups, dtype=moment.dtype), cross, 0.0, (note,))
        wanted = max(DAMPING, _NOISE * groups / rows) if damping is None else damping
        found = factor(moment, wanted)
        notes = []
        if damping is None and wanted > 1:
            notes.append(f"{rows} input rows for {groups} groups: offsets damped by {wanted:.2g}")
        if found.damping > wanted:
            notes.append(f"damping of offsets raised to {found.damping:.2g}")
        return cls(found.lower, cross, found.damping, tuple(notes))

    def residual(self, change: Tensor) -> Tensor:
        """E, `[N, L]`: the addition to the weights, per group, that best compensates a change.

        E minimizes the mean of `‖x Dᵀ − S(x) Eᵀ‖² + λ ‖E‖²` over the calibration rows, which means
        `E (M + λ) = D Xᵀ`. For any λ, the output error is never larger than before, and a group
        whose inputs are all zero gets 0.

        Args:
            change: D = W − Wq, `[N, K]`.

        Returns:
            float64.
        """
        return torch.cholesky_solve(self.cross @ change.double().T, self.lower).T


def refine_offset(
    weight: Tensor, affine: GroupAffine, statistics: ActivationStatistics
) -> tuple[GroupAffine, tuple[str, ...]]:
    """The same codes and scale with the offset that minimizes the output error, and notes.

    Args:
        weight: W, `[N, K]`.
        affine: W quantized.
        statistics: Statistics of the layer's input.
    """
    wide = dataclasses.replace(affine, scale=affine.scale.double(), offset=affine.offset.double())
    moments = PooledMoments.of(statistics, affine.group_size)
    residual = moments.residual(weight.double() - wide.dequantize())
    offset = (wide.offset + residual).to(affine.offset.dtype)
    return dataclasses.replace(affine, offset=offset), moments.notes

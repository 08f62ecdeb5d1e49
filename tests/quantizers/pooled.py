"""What best makes up for a change of a layer's weights, in one call."""

from __future__ import annotations

from torch import Tensor

from qalora_compile.quantizers.refine import PooledMoments
from qalora_compile.quantizers.statistics import ActivationStatistics


def pooled_residual(
    change: Tensor,
    statistics: ActivationStatistics,
    group_size: int,
    *,
    damping: float | None = None,
) -> Tensor:
    """`PooledMoments.residual` of the moments of a layer's input."""
    return PooledMoments.of(statistics, group_size, damping).residual(change)

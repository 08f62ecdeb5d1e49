"""The best low-rank form of a correction that is constant inside groups.

A pooled adapter of rank r adds a matrix `C`, `[N, L]`, of rank r to the offsets of a quantized
weight. Let `E` be the change of the offsets that minimises the output error (`refine`), and `M` the
damped second moments of the group sums. Any other change costs `‖(C − E) M^½‖²` more than E does,
so the best `C` of rank r is the truncated singular value decomposition of `E M^½` (Eckart and
Young, 1936), times `M^−½`. The columns of the truncated parts being orthogonal, each rank more
lowers the output error, and at full rank `C = E`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.ir.affine import group_count, sum_groups
from qalora_compile.quantizers.damping import factor
from qalora_compile.quantizers.refine import DAMPING, pooled_residual
from qalora_compile.quantizers.statistics import ActivationStatistics


@dataclass(frozen=True)
class PooledCorrection:
    """`E M^½` by its singular values, float64; R = min(N, L).

    Attributes:
        left: U, `[N, R]`.
        values: Falling, `[R]`; a correction of rank r lowers the (damped) mean squared output error
            by the sum of the squares of the first r.
        right: `Vᵀ M^−½`, `[R, L]`.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(
        cls, change: Tensor, group_size: int, statistics: ActivationStatistics | None = None
    ) -> PooledCorrection:
        """What low ranks can make up for of a change of the weights.

        Args:
            change: D = W − Wq, `[N, K]`.
            group_size: g, of the adapter; L = ceil(K / g).
            statistics: Of the layer's input; without, all inputs count alike and are uncorrelated:
                E is the mean of D in each group.
        """
        root = _root(change.shape[1], group_size, statistics)
        if statistics is None:
            residual = sum_groups(change.double(), group_size) / root.diagonal().square()
        else:
            residual = pooled_residual(change, statistics, group_size)
        left, values, right = torch.linalg.svd(residual @ root, full_matrices=False)
        return cls(
            left, values, torch.linalg.solve_triangular(root, right, upper=False, left=False)
        )

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B `[N, r]` and A `[r, L]`, r = min(rank, R), whose product is the best correction."""
        return self.left[:, :rank] * self.values[:rank], self.right[:rank]


def _root(k: int, group_size: int, statistics: ActivationStatistics | None) -> Tensor:
    """A lower triangular square root of M, `[L, L]`, that can be inverted."""
    groups = group_count(k, group_size)
    if statistics is None:
        sizes = sum_groups(torch.ones(k, dtype=torch.float64), group_size)
        return torch.diag(sizes.sqrt())
    moment, _ = statistics.pooled(group_size)
    if not float(moment.diagonal().sum()) > 0:  # no input at all: there is nothing to correct
        return torch.eye(groups, dtype=torch.float64)
    return factor(moment, DAMPING).lower

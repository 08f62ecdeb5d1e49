"""The best low-rank correction that is constant inside groups.

A pooled adapter of rank r adds a matrix `C`, `[N, L]`, of rank r to the offsets of a quantized
weight. Let `E` be the change of the offsets that minimizes the output error (`refine`), and `M` the
damped second moments of the group sums. Any other change costs `‖(C − E) M^½‖²` more than E does,
so the best `C` of rank r is the truncated singular value decomposition of `E M^½` (Eckart and
Young, 1936), times `M^−½`. Since the columns of the truncated parts are orthogonal, each additional
rank lowers the output error, and at full rank `C = E`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.ir.affine import sum_groups
from qalora_compile.quantizers.refine import PooledMoments
from qalora_compile.quantizers.statistics import ActivationStatistics

_LITTLE = 0.05
"""Below this fraction of the output error, corrections are no guide for starts and ranks."""


@dataclass(frozen=True)
class PooledCorrection:
    """The singular value decomposition of `E M^½`, float64; R = min(N, L).

    Attributes:
        left: U, `[N, R]`.
        values: Singular values in decreasing order, `[R]`; a correction of rank r lowers the
            (damped) mean squared output error by the sum of the squares of the first r.
        right: `Vᵀ M^−½`, `[R, L]`.
        error: The mean squared output error of the change itself, before any correction.
        notes: Notes on few calibration rows and on damping.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    error: float
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, change: Tensor, group_size: int, statistics: ActivationStatistics | None = None
    ) -> PooledCorrection:
        """How much of a change of the weights low-rank corrections can compensate.

        Args:
            change: D = W − Wq, `[N, K]`.
            group_size: Group size g of the adapter; L = ceil(K / g).
            statistics: Statistics of the layer's input; without them, all inputs have equal weight
                and are uncorrelated, so that E is the mean of D in each group.
        """
        notes: tuple[str, ...] = ()
        if statistics is None:
            sizes = sum_groups(torch.ones(change.shape[1], dtype=torch.float64), group_size)
            root = torch.diag(sizes.sqrt())
            residual = sum_groups(change.double(), group_size) / sizes
            error = float(change.double().square().sum())
        else:
            moments = PooledMoments.of(statistics, group_size)
            root, notes = moments.lower, moments.notes
            residual, error = moments.residual(change), statistics.output_error(change)
        left, values, right = torch.linalg.svd(residual @ root, full_matrices=False)
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        return cls(left, values, right, error, notes)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B `[N, r]` and A `[r, L]`, r = min(rank, R), whose product is the best correction."""
        return self.left[:, :rank] * self.values[:rank], self.right[:rank]


class CorrectionTally:
    """Summary of the corrections of all weights."""

    def __init__(self) -> None:
        self._gained: dict[str, float] = {}
        self._error: dict[str, float] = {}
        self._notes: dict[str, tuple[str, ...]] = {}

    def add(self, path: str, parts: Sequence[PooledCorrection]) -> None:
        """Count one weight, or its experts if it holds several matrices."""
        self._gained[path] = sum(float(part.values.square().sum()) for part in parts)
        self._error[path] = sum(part.error for part in parts)
        self._notes[path] = tuple(dict.fromkeys(note for part in parts for note in part.notes))

    def notes(self, *, refined: bool) -> list[str]:
        """The distinct notes with their weights, and a note if nothing is left to correct.

        Args:
            refined: Whether offsets may have been refined when the weights were quantized.
        """
        where: dict[str, list[str]] = defaultdict(list)
        for path, notes in self._notes.items():
            for note in notes:
                where[note].append(path)
        found = []
        for note, paths in where.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            found.append(f"adapters: {note} ({paths[0]}{more})")
        error = sum(self._error.values())
        share = sum(self._gained.values()) / error if error > 0 else 1.0
        if refined and share < _LITTLE:
            found.append(
                f"adapters of any rank can correct {share:.1%} of the layers' output errors, which "
                "is what refined offsets leave; refine_offsets=False leaves the errors to them"
            )
        return found

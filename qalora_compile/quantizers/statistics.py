"""`ActivationStatistics`: the second moments of a layer's inputs, for quantizers.

For a layer `y = x Wᵀ` and a change `D` of its weights, the mean squared change of the output over
the calibration rows is a function of `H = mean of x xᵀ` alone: `‖x Dᵀ‖² = trace(D H Dᵀ)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import sum_groups

_ROWS_AT_A_TIME = 4096
"""Number of rows that are widened to float64 at a time."""


@dataclass(frozen=True)
class ActivationStatistics:
    """Second moments of the input x of one layer over calibration rows.

    Attributes:
        moment: H, the mean of x xᵀ, `[K, K]`, float64, symmetric.
        rows: Number of rows of x.
    """

    moment: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor) -> ActivationStatistics:
        """Statistics of the rows of x, `[.., K]`.

        Raises:
            UserInputError: x has no row, or holds NaN or infinite values.
        """
        rows = MomentSum()
        rows.add(x)
        return rows.statistics()

    def merged(self, other: ActivationStatistics) -> ActivationStatistics:
        """Statistics of the rows of both objects."""
        rows = self.rows + other.rows
        share = self.rows / rows
        return ActivationStatistics(share * self.moment + (1 - share) * other.moment, rows)

    def output_error(self, change: Tensor) -> float:
        """Mean over the rows of ‖x Dᵀ‖² for a change of the weights D, `[N, K]`."""
        return float(self.row_errors(change).sum())

    def row_errors(self, change: Tensor) -> Tensor:
        """`output_error` of each row of a change, `[N]` float64."""
        wide = change.double()
        return ((wide @ self.moment) * wide).sum(-1)

    def pooled(self, group_size: int) -> tuple[Tensor, Tensor]:
        """Moments of the group sums S(x): `(mean of S(x) S(x)ᵀ [L, L], mean of S(x) xᵀ [L, K])`."""
        half = sum_groups(self.moment, group_size)  # [K, L]: mean of x S(x)ᵀ
        return sum_groups(half.T, group_size), half.T


class MomentSum:
    """Accumulates `Σ x xᵀ` and the number of rows."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._rows = 0

    def add(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Add the rows of x, `[.., K]`, for which `keep`, one boolean for each row, is true.

        Raises:
            UserInputError: a row holds NaN or infinite values.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows if keep is None else rows[keep.reshape(-1)]
        if not bool(torch.isfinite(rows).all()):
            raise UserInputError("a layer's input on the calibration data is NaN or infinite")
        if self._total is None:
            self._total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
        for part in rows.split(_ROWS_AT_A_TIME):
            wide = part.double()
            self._total.addmm_(wide.T, wide)
        self._rows += rows.shape[0]

    def statistics(self) -> ActivationStatistics:
        """Statistics of all rows added.

        Raises:
            UserInputError: there were no rows.
        """
        if self._total is None or not self._rows:
            raise UserInputError(
                "the calibration data give a layer no input row",
                hint="give data that are not all padding",
            )
        return ActivationStatistics(self._total / self._rows, self._rows)

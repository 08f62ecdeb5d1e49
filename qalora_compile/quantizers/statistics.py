"""`ActivationStatistics`: what a quantizer may know of the inputs of a layer, their second moments.

For a layer `y = x Wᵀ` and a change `D` of its weights, the mean squared change of the output over
the calibration rows is a function of `H = mean of x xᵀ` alone: `‖x Dᵀ‖² = trace(D H Dᵀ)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import sum_groups


@dataclass(frozen=True)
class ActivationStatistics:
    """Second moments of the input x of one layer over calibration rows.

    Attributes:
        moment: H, the mean of x xᵀ, `[K, K]`, float64, symmetric.
        rows: How many rows of x were seen.
    """

    moment: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor) -> ActivationStatistics:
        """Statistics of the rows of x, `[.., K]`.

        Raises:
            UserInputError: x has no row, or holds NaN or infinite values.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        if not rows.shape[0]:
            raise UserInputError("the calibration data give a layer no input row")
        if not bool(torch.isfinite(rows).all()):
            raise UserInputError("a layer's input on the calibration data is NaN or infinite")
        return cls(rows.T @ rows / rows.shape[0], rows.shape[0])

    def merged(self, other: ActivationStatistics) -> ActivationStatistics:
        """Statistics of the rows of both."""
        rows = self.rows + other.rows
        share = self.rows / rows
        return ActivationStatistics(share * self.moment + (1 - share) * other.moment, rows)

    def output_error(self, change: Tensor) -> float:
        """Mean over the rows of ‖x Dᵀ‖² for a change of the weights D, `[N, K]`."""
        wide = change.double()
        return float(((wide @ self.moment) * wide).sum())

    def pooled(self, group_size: int) -> tuple[Tensor, Tensor]:
        """Moments of the group sums S(x): `(mean of S(x) S(x)ᵀ [L, L], mean of S(x) xᵀ [L, K])`."""
        half = sum_groups(self.moment, group_size)  # [K, L]: mean of x S(x)ᵀ
        return sum_groups(half.T, group_size), half.T

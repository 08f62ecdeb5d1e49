"""Cholesky factors of second moments, damped because they may be singular."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError

_RAISE = 10.0
_MOST = 1.0
"""The largest damping: beyond it, the diagonal outweighs the data."""


@dataclass(frozen=True)
class Factor:
    """Factor of `moment + damping · mean diagonal · I`.

    Attributes:
        lower: The Cholesky factor, lower triangular.
        damping: The damping that was used.
    """

    lower: Tensor
    damping: float


def factor(moment: Tensor, damping: float) -> Factor:
    """Factor a symmetric positive semi-definite matrix `[K, K]`, damped enough for it to succeed.

    Args:
        moment: float64, with a positive trace.
        damping: Fraction of the mean diagonal that is added to the diagonal; multiplied by ten each
            time the factorization fails.

    Raises:
        UserInputError: it holds NaN or infinite values, or is far from positive semi-definite.
    """
    mean = moment.diagonal().mean()
    tried = damping
    while bool(torch.isfinite(moment).all()) and tried <= max(_MOST, damping):
        damped = moment + torch.eye(len(moment), dtype=moment.dtype) * (tried * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            return Factor(lower, tried)
        tried *= _RAISE
    raise UserInputError(
        "the second moments of a layer's input cannot be factored",
        hint="give more calibration data, and look for broken ones",
    )

"""Round to the nearest of 2^bits levels between a group's smallest and largest weight."""

from __future__ import annotations

from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.groups import round_to_nearest, split_groups


def quantize_minmax(weight: Tensor, spec: QuantSpec) -> GroupAffine:
    """Scale = (max − min) / (2^bits − 1), offset = min, q = round((w − offset) / scale).

    arXiv 2309.14717, Eq. 1. The offset is the minimum itself, so a group of equal weights gets
    scale 0 and comes back exactly. Scale and offset are rounded to storage first and codes are
    chosen against the rounded values; the arithmetic is float64, so no range overflows.

    Args:
        weight: `[N, K]`, floating and finite.
        spec: bits and group_size.
    """

    def parameters(rows: Tensor) -> tuple[Tensor, Tensor]:
        grouped = split_groups(rows, spec.group)
        low, high = grouped.amin(-1), grouped.amax(-1)
        return (high - low) / (2**spec.width - 1), low

    return round_to_nearest(weight, spec, parameters)

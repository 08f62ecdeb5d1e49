"""Round to the nearest of 2^bits levels between a group's smallest and largest weight."""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine, expand_groups, group_count

_CHUNK_ELEMENTS = 1 << 20
"""Rows of about so many weights are quantized at a time: the arithmetic takes 50 bytes a weight."""


def quantize_minmax(weight: Tensor, spec: QuantSpec) -> GroupAffine:
    """Scale = (max − min) / (2^bits − 1), offset = min, q = round((w − offset) / scale).

    arXiv 2309.14717, Eq. 1. The offset is the minimum itself, so a group of equal weights gets
    scale 0 and comes back exactly. Scale and offset are rounded to storage first and codes are
    chosen against the rounded values; the arithmetic is float64, so no range overflows.

    Args:
        weight: `[N, K]`, floating and finite.
        spec: bits and group_size.
    """
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    parts = [_quantize_rows(part, spec) for part in weight.detach().split(rows)]
    codes, scale, offset = (torch.cat(each) for each in zip(*parts, strict=True))
    return GroupAffine(codes, scale, offset, spec.width, spec.group_size)


def _quantize_rows(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[N, K]`, scale and offset `[N, L]` of some rows."""
    n, k = weight.shape
    groups = group_count(k, spec.group_size)
    storage = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wide = weight.double()
    # A repeated last column fills the tail group without moving its minimum or maximum.
    tail = wide[:, -1:].expand(n, groups * spec.group_size - k)
    grouped = torch.cat([wide, tail], dim=1).unflatten(1, (groups, spec.group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    qmax = 2**spec.width - 1
    scale = ((high - low) / qmax).to(storage)
    offset = low.to(storage)
    step = expand_groups(scale.double(), spec.group_size, k)
    level = (wide - expand_groups(offset.double(), spec.group_size, k)) / step
    codes = torch.where(step == 0, torch.zeros_like(level), level.round().clamp(0, qmax))
    return codes.to(torch.uint8), scale, offset

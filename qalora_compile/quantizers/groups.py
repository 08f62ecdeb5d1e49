"""Shared by the methods: groups of a weight, nearest codes, work on a block of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine, expand_groups, group_count

_CHUNK_ELEMENTS = 1 << 17
"""About this many weights are quantized at a time, which fit a core's cache."""

Parameters = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Chooses scale and offset, float64 `[n, L]`, of some rows of a weight."""


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """The groups of a weight `[N, K]` as float64 `[N, L, g]`.

    A repeated last column fills the tail group without moving its minimum or maximum.
    """
    n, k = weight.shape
    groups = group_count(k, group_size)
    wide = weight.double()
    tail = wide[:, -1:].expand(n, groups * group_size - k)
    grouped: Tensor = torch.cat([wide, tail], dim=1).unflatten(1, (groups, group_size))
    return grouped


def split_columns(values: Tensor, group_size: int) -> Tensor:
    """Values per column, `[K]`, as `[L, g]`; 0 for repeated columns of the tail group."""
    groups = group_count(len(values), group_size)
    filled = torch.nn.functional.pad(values, (0, groups * group_size - len(values)))
    grouped: Tensor = filled.unflatten(0, (groups, group_size))
    return grouped


def storage_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of stored scales and offsets."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def nearest_codes(weight: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec) -> Tensor:
    """The code of the level nearest to each weight, uint8 `[N, K]`; 0 if the scale is 0."""
    k = weight.shape[1]
    step = expand_groups(scale.double(), spec.group, k)
    level = (weight.double() - expand_groups(offset.double(), spec.group, k)) / step
    codes = torch.where(
        step == 0, torch.zeros_like(level), level.round().clamp(0, 2**spec.width - 1)
    )
    return codes.to(torch.uint8)


def round_to_nearest(weight: Tensor, spec: QuantSpec, parameters: Parameters) -> GroupAffine:
    """Choose scale and offset by blocks of rows, round them to storage, then choose codes."""
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    storage = storage_dtype(weight)
    parts = []
    for part in weight.detach().split(rows):
        scale, offset = (values.to(storage) for values in parameters(part))
        parts.append((nearest_codes(part, scale, offset, spec), scale, offset))
    codes, scale, offset = (torch.cat(each) for each in zip(*parts, strict=True))
    return GroupAffine(codes, scale, offset, spec.width, spec.group)

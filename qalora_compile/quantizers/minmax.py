"""Rounds to the nearest of 2^bits levels between a group's smallest and largest weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine, expand_groups, group_count
from qalora_compile.ir.ops.integer_zero_linear import shorten
from qalora_compile.quantizers.groups import round_to_nearest, split_groups


def quantize_minmax(weight: Tensor, spec: QuantSpec) -> GroupAffine:
    """Scale = (max − min) / (2^bits − 1), offset = min, q = round((w − offset) / scale).

    arXiv 2309.14717, Eq. 1. The offset is the minimum itself, so a group of equal weights gets
    scale 0 and is reconstructed exactly. Scale and offset are rounded to storage first, and codes
    are chosen for the rounded values; the arithmetic is float64, so no range overflows.

    Args:
        weight: `[N, K]`, floating and finite.
        spec: bits and group_size.
    """

    def parameters(rows: Tensor) -> tuple[Tensor, Tensor]:
        grouped = split_groups(rows, spec.group)
        low, high = grouped.amin(-1), grouped.amax(-1)
        return (high - low) / (2**spec.width - 1), low

    return round_to_nearest(weight, spec, parameters)


_LEAST_SIGNED_BITS = 4
"""Groups of narrower signed integers are not looked for."""
_CHUNK_ELEMENTS = 1 << 20
"""About this many weights are quantized at a time; the arithmetic takes 50 bytes per weight."""


def quantize_integer_zero(weight: Tensor, bits: int, group_size: int) -> GroupAffine:
    """W ≈ scale · (q − z) with an integer z from 0 to 2^bits − 1; offset = −scale · z, exactly.

    The range of a group is widened to contain 0, so that z is a code (as in ONNX's QuantizeLinear).
    Scales have 16 significant bits (45 in float64), so that the product with z is exact and
    `−offset / scale` returns z. Kernels with integer zero-points then need no correction. A group
    of equal weights is reconstructed exactly, and so is one whose weights are already the products
    of a scale and signed integers of at most `bits` bits (as GGUF's Q8_0, Q6_K and Q4_0 store
    them): it keeps this scale, with the zero-point 2^(bits − 1).

    Args:
        weight: `[N, K]`, floating and finite.
        bits: Width of a code, at most 8.
        group_size: Group size g.

    Scale and offset are float64 for a float64 weight, else float32.
    """
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    parts = [_quantize_rows(part, bits, group_size) for part in weight.detach().split(rows)]
    codes, scale, offset = (torch.cat(each) for each in zip(*parts, strict=True))
    return GroupAffine(codes, scale, offset, bits, group_size)


def _quantize_rows(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[n, K]`, scale and offset `[n, L]` of some rows."""
    n, k = weight.shape
    groups = group_count(k, group_size)
    storage = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wide = weight.double()
    # A repeated last column fills the tail group without moving its minimum or maximum.
    tail = wide[:, -1:].expand(n, groups * group_size - k)
    grouped = torch.cat([wide, tail], dim=1).unflatten(1, (groups, group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    qmax = 2**bits - 1
    span = high.clamp_min(0) - low.clamp_max(0)
    # A single step of any size is exact: such groups hold one value, or 0 and one other.
    scale = torch.where(low == high, low.abs(), shorten(span / qmax, storage, up=True))
    scale = scale.to(storage).double()
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = (-low.clamp_max(0) / scale).round().clamp(0, qmax)
    level = wide / expand_groups(scale, group_size, k)
    level = level + expand_groups(zero_point, group_size, k)
    codes = level.round().clamp(0, qmax).to(torch.uint8)
    parts = codes, scale.to(storage), (-scale * zero_point).to(storage)
    return _keep_symmetric(parts, wide, grouped.abs().amax(-1), bits, group_size)


def _keep_symmetric(
    parts: tuple[Tensor, Tensor, Tensor], wide: Tensor, peak: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset, exact for the groups that are on a grid of signed integers.

    The step of such a group is its largest magnitude `peak` `[n, L]` divided by the largest code,
    which is 2^(b − 1) or one less for codes of b bits.
    """
    codes, scale, offset = parts
    k, zero = wide.shape[1], 2 ** (bits - 1)
    wide_scale, wide_offset = (expand_groups(t.double(), group_size, k) for t in (scale, offset))
    done = _all_of_groups(codes * wide_scale + wide_offset == wide, group_size)
    for width in range(bits, _LEAST_SIGNED_BITS - 1, -1):
        for largest in (2 ** (width - 1) - 1, 2 ** (width - 1)):
            step = (peak / largest).to(scale.dtype).double()
            step = torch.where(step == 0, 1.0, step)
            across = expand_groups(step, group_size, k)
            level = (wide / across).round().clamp(-zero, zero - 1)
            found = _all_of_groups(level * across == wide, group_size) & ~done
            inside = expand_groups(found, group_size, k)
            codes = torch.where(inside, (level + zero).to(codes.dtype), codes)
            scale = torch.where(found, step.to(scale.dtype), scale)
            offset = torch.where(found, (-step * zero).to(scale.dtype), offset)
            done |= found
    return codes, scale, offset


def _all_of_groups(flags: Tensor, group_size: int) -> Tensor:
    """Whether all flags of each group of a row hold: `[n, L]` of `[n, K]`."""
    rest = -flags.shape[1] % group_size
    padded = functional.pad(flags, (0, rest), value=True)
    found: Tensor = padded.unflatten(1, (-1, group_size)).all(-1)
    return found

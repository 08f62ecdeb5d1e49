"""Packed storage of codes for the operator `qalora::GroupQuantLinear`, group by group.

The packed tensor is `[N, L, g · bits / 8]` uint8 with L = ceil(K / g); the tail group is filled up
to g with zero codes, so every group is complete. For 2, 4 and 8 bits the bytes are those of ONNX
Runtime's MatMulNBits: code k of a group in bits `k · bits …` of the group's bytes, low bits first.

3-bit codes are split into two planes per **row**, so that a row is decoded like a 2-bit row with
one more bit. First come the low two bits of all L · g codes of the row, four to a byte, low bits
first. Then come the high bits, in units that each belong to 64 bytes of the first plane (256
codes; the last unit of a row to the u bytes that are left): bit `f · u + i` of a unit, low bits
first, is the high bit of code `4 i + f`, so that the bits of one field of all bytes are adjacent.
The last two dimensions of the packed tensor only cut the row's bytes into L equal parts; see
`docs/reference/operators.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.errors import UserInputError
from qalora_compile.ir.packing.bitstream import pack_codes, unpack_codes

GROUP_UNIT = 16
"""The operator takes groups of a multiple of this many codes."""
UNIT_CODES = 256
"""Codes that one unit of the plane of high bits belongs to."""


def pack_groups(codes: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Pack codes for `qalora::GroupQuantLinear`.

    Args:
        codes: `[N, K]` uint8, each below 2^bits.
        bits: 2, 3, 4 or 8.
        group_size: g, a multiple of 16; need not divide K.

    Returns:
        `[N, L, g · bits / 8]` uint8, L = ceil(K / g).

    Raises:
        UserInputError: the operator has no such width or group size.
    """
    _check(bits, group_size)
    n, k = codes.shape
    padded = functional.pad(codes, (0, -k % group_size))
    if bits == 3:
        high = _pack_bits(_by_field(padded >> 2, inverse=False))
        rows = torch.cat([pack_codes(padded & 3, 2), high], dim=1)
    else:
        rows = pack_codes(padded, bits)
    return rows.reshape(n, -1, group_size * bits // 8)


def unpack_groups(packed: Tensor, *, bits: int, group_size: int, k: int) -> Tensor:
    """Undo `pack_groups`: `[N, L, g · bits / 8]` uint8 to codes `[N, k]` uint8.

    Raises:
        UserInputError: the operator has no such width or group size.
    """
    _check(bits, group_size)
    groups, rows = packed.shape[1], packed.flatten(1)
    if bits != 3:
        return unpack_codes(rows, bits, k)
    low_bytes = groups * group_size // 4
    low = unpack_codes(rows[:, :low_bytes], 2, k)
    return low | _by_field(_unpack_bits(rows[:, low_bytes:]), inverse=True)[:, :k] << 2


def _check(bits: int, group_size: int) -> None:
    if bits not in (2, 3, 4, 8) or group_size < GROUP_UNIT or group_size % GROUP_UNIT:
        raise UserInputError(
            f"GroupQuantLinear has no {bits}-bit codes in groups of {group_size}",
            hint=f"bits: 2, 3, 4, 8; group_size: a multiple of {GROUP_UNIT}",
        )


def _by_field(values: Tensor, *, inverse: bool) -> Tensor:
    """Reorder the high bits of rows of codes, `[N, L · g]`, from code order to unit order."""
    full = values.shape[1] // UNIT_CODES * UNIT_CODES
    parts = []
    for part in (values[:, :full], values[:, full:]):
        size = min(part.shape[1], UNIT_CODES) // 4
        if size:
            units = part.unflatten(1, (-1, 4, size) if inverse else (-1, size, 4))
            parts.append(units.transpose(2, 3).flatten(1))
    return torch.cat(parts, dim=1)


def _pack_bits(values: Tensor) -> Tensor:
    """Pack `[N, 8m]` zeros and ones to `[N, m]` uint8, low bits first."""
    weights = 2 ** torch.arange(8, device=values.device, dtype=torch.uint8)
    packed: Tensor = (values.unflatten(1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return packed


def _unpack_bits(packed: Tensor) -> Tensor:
    """Undo `_pack_bits`."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed[:, :, None] >> shifts & 1).flatten(1)


MIN_BLOCK = 16


MAX_BLOCK = 256  # blocks of 512 and more gave zeros in ONNX Runtime up to 1.26


def padded_group(group_size: int) -> int:
    """The least width, at or above the group size, that is a multiple of a block."""
    return -(-group_size // MIN_BLOCK) * MIN_BLOCK


def largest_block(width: int) -> int:
    """The largest block, a power of two, that divides a group of `width`, a multiple of 16."""
    return min(width & -width, MAX_BLOCK)


def stored_bits(bits: int, *, narrow: bool) -> int:
    """The width in which the kernel takes codes of `bits` bits.

    3-bit codes are stored in 4 bits, as there is no 3-bit type or kernel. So are 2-bit codes unless
    `narrow`: the 2-bit kernel is about 100 times slower in float32.
    """
    return 4 if bits == 3 or (bits == 2 and not narrow) else bits

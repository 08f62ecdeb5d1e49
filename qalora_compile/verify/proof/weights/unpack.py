"""The verifier's own decoder of codes, for every layout in which this package stores them.

Written for numpy from the specifications (formats.md and operators.md in docs/reference,
ONNX and ONNX Runtime) and independently of the code that packs.
"""

from __future__ import annotations

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import Array

_UNIT_CODES = 256


def from_bits(stream: Array, bits: int, count: int) -> Array:
    """The first `count` codes of each row of a little-endian bit stream, `[.., bytes]` uint8."""
    lead = stream.shape[:-1]
    if 8 % bits == 0:
        lanes = np.arange(0, 8, bits, dtype=np.uint8)
        codes = stream[..., None] >> lanes & np.uint8(2**bits - 1)
        return np.asarray(codes.reshape(*lead, -1)[..., :count])
    each = np.unpackbits(stream, axis=-1, bitorder="little", count=count * bits)
    values = np.packbits(each.reshape(*lead, count, bits), axis=-1, bitorder="little")
    return values[..., 0]


def row_codes(packed: Array, bits: int, k: int) -> Array:
    """Codes `[N, K]` of `group_linear`: a bit stream per row, `[N, ceil(K / 8) · bits]`."""
    return from_bits(packed, bits, k)


def block_codes(packed: Array, bits: int) -> Array:
    """Codes `[N, Lb · block]` of MatMulNBits: `[N, Lb, block · bits / 8]`, low bits first."""
    n, blocks, width = packed.shape
    return from_bits(packed.reshape(n, -1), bits, blocks * width * 8 // bits)


def group_codes(packed: Array, bits: int, group_size: int) -> Array:
    """Codes `[N, L · g]` of GroupQuantLinear: `[N, L, g · bits / 8]`; 3 bits are in two planes."""
    if bits != 3:
        return block_codes(packed, bits)
    n, groups, _ = packed.shape
    rows, count = packed.reshape(n, -1), groups * group_size
    low = from_bits(rows[:, : count // 4], 2, count)
    high = from_bits(rows[:, count // 4 :], 1, count)
    code = np.arange(count)
    unit, place = np.divmod(code, _UNIT_CODES)
    quarter = np.minimum(count - unit * _UNIT_CODES, _UNIT_CODES) // 4
    where = unit * _UNIT_CODES + place % 4 * quarter + place // 4
    return np.asarray(low + 4 * high[:, where])


def flat_codes(stream: Array, bits: int, shape: tuple[int, ...]) -> Array:
    """Codes of an ONNX tensor of small integers: one bit stream over all of its elements."""
    if bits == 8:
        return stream.reshape(shape)
    return from_bits(stream.reshape(-1), bits, int(np.prod(shape))).reshape(shape)


def flat_columns(stream: Array, bits: int, shape: tuple[int, int], part: slice) -> Array:
    """Some columns of such a matrix; if they begin and end with a byte, no others are decoded."""
    k, n = shape
    if any(place * bits % 8 for place in (n, part.start, part.stop)) or part.stop > n:
        return flat_codes(stream, bits, shape)[:, part]
    columns = stream.reshape(k, n * bits // 8)[:, part.start * bits // 8 : part.stop * bits // 8]
    return flat_codes(np.ascontiguousarray(columns), bits, (k, part.stop - part.start))


def repeat_groups(values: Array, width: int, k: int) -> Array:
    """One value per group, `[N, L]`, as one per column, `[N, k]`."""
    return np.repeat(values, width, axis=1)[:, :k]

"""Effective weights of this package's layers and their rounding, from stored tensors.

Every function returns rows of a matrix (`linear_map.Rows`): the weight, the size of its parts, and
the radius, which is the largest error that rounding for storage explains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import ROUNDING, SMALLEST, Array, StoredTensor
from qalora_compile.verify.proof.weights.linear_map import NotLinearError, Reading, Rows
from qalora_compile.verify.proof.weights.unpack import (
    block_codes,
    flat_columns,
    from_bits,
    group_codes,
    repeat_groups,
    row_codes,
)

ARITHMETIC = 2.0**-48
"""Relative to the size of a weight: 32 roundings of float64, more than in any decoder here."""
_MARGIN = 1 + 1e-5
"""Factor on the half step of a digit, because its scale is rounded to float32."""

_SCALE_STEP = {"float32": 2.0**-16, "float64": 2.0**-45}
"""The largest half step of a scale with few significant bits, relative to it."""

Part = Callable[[slice, int], Rows]


def rounding(values: Array, dtype: str) -> Array:
    """Largest distance of stored numbers from the numbers that were rounded to them."""
    unit = ROUNDING[dtype]
    result: Array = np.abs(values) * (unit / (1 - unit)) + SMALLEST[dtype]
    return result


def _take(stored: StoredTensor, part: slice, expert: int) -> Array:
    """Rows of a matrix, or of one expert if the tensor has a leading axis of experts."""
    values = stored.read()
    return np.asarray(values[expert][part] if expert >= 0 else values[part])


def _wide(stored: StoredTensor, part: slice, expert: int) -> Array:
    values = stored.values()
    return np.asarray(values[expert][part] if expert >= 0 else values[part], np.float64)


def on_codes(
    packed: StoredTensor,
    scale: StoredTensor,
    offset: StoredTensor,
    bits: int,
    group_size: int,
    k: int,
    *,
    rounded: bool,
) -> Part:
    """`W = scale · q + offset`; `rounded`: the offset was computed and then rounded."""

    def rows(part: slice, expert: int) -> Rows:
        codes = row_codes(_take(packed, part, expert), bits, k).astype(np.float64)
        s, o = _wide(scale, part, expert), _wide(offset, part, expert)
        moved = rounding(o, offset.dtype) if rounded else np.zeros_like(o)
        product = codes * repeat_groups(s, group_size, k)
        wide = repeat_groups(o, group_size, k)
        size = np.abs(product) + np.abs(wide)
        radius = repeat_groups(moved, group_size, k) + ARITHMETIC * size
        return Rows(product + wide, size, radius, _coarse(moved, s))

    return rows


def integer_zero_linear(
    packed: StoredTensor,
    scale: StoredTensor,
    offset: StoredTensor,
    lora_a: StoredTensor,
    lora_b: StoredTensor,
    bits: int,
    group_size: int,
    k: int,
    scaling: float,
    kind: str,
) -> Part:
    """`W = s · (q − z)`, z an integer; an adapter changed z (`integer`) or s (`scale`).

    Scales are rounded to 16 significant bits, so half a step of them is within the radius.
    """

    def rows(part: slice, expert: int) -> Rows:
        codes = row_codes(_take(packed, part, expert), bits, k).astype(np.float64)
        s, o = _wide(scale, part, expert), _wide(offset, part, expert)
        update = scaling * (_wide(lora_b, part, expert) @ _wide(lora_a, slice(None), expert))
        zero, step = np.round(-o / s), np.zeros_like(s)
        if kind == "scale":
            s = s * (1 + update)
            step = np.abs(s) * _SCALE_STEP[scale.dtype]
        else:
            # A full-precision scale, of a group of equal weights, is exact only times 0 and 1.
            units = np.frexp(s)[0] / _SCALE_STEP[scale.dtype]
            most = np.where(units == np.round(units), 2.0**bits - 1, 1.0)
            zero = np.clip(np.round(zero - update / s), 0, most)
        level = codes - repeat_groups(zero, group_size, k)
        size = repeat_groups(np.abs(s), group_size, k) * (
            codes + repeat_groups(zero, group_size, k)
        )
        radius = np.abs(level) * repeat_groups(step, group_size, k) + ARITHMETIC * size
        return Rows(repeat_groups(s, group_size, k) * level, size, radius)

    return rows


def affine_linear(
    stored: Sequence[StoredTensor],
    shift: StoredTensor | None,
    bits: int,
    group_size: int,
    pool: int,
    k: int,
    scaling: float,
) -> Part:
    """`W = s · q + o` with the scales, offsets and codes that an affine adapter makes.

    `stored`: codes, scale, offset, A, B and gain; `shift`: what moves codes, in units of 4.
    """
    packed, scale, offset, lora_a, lora_b, gain = stored
    dtype = np.dtype(scale.dtype)

    def rows(part: slice, expert: int) -> Rows:
        codes = row_codes(_take(packed, part, expert), bits, k).astype(np.float64)
        if shift is not None:
            moved = _take(shift, part, expert)
            level = codes.astype(moved.dtype) + moved * moved.dtype.type(4)
            codes = np.clip(np.rint(level), 0, 2**bits - 1).astype(np.float64)
        s, o, g = (_wide(tensor, part, expert) for tensor in (scale, offset, gain))
        update = scaling * (_wide(lora_b, part, expert) @ _wide(lora_a, slice(None), expert))
        s = (s * (1 + g)).astype(dtype).astype(np.float64)  # the layer computes with this number
        o = o * (1 + g) + repeat_groups(update, pool // group_size, o.shape[1])
        product, wide = codes * repeat_groups(s, group_size, k), repeat_groups(o, group_size, k)
        size = np.abs(product) + np.abs(wide)
        radius = repeat_groups(rounding(o, offset.dtype), group_size, k) + ARITHMETIC * size
        return Rows(product + wide, size, radius)

    return rows


def group_quant(
    packed: StoredTensor, scale: StoredTensor, zero_point: StoredTensor, bits: int, group_size: int
) -> Part:
    """GroupQuantLinear: `W = scale · (q − zero_point)`, real zero-points."""

    def rows(part: slice, expert: int) -> Rows:
        codes = group_codes(_take(packed, part, expert), bits, group_size).astype(np.float64)
        k = codes.shape[1]
        s, z = _wide(scale, part, expert), _wide(zero_point, part, expert)
        moved = np.abs(s) * rounding(z, zero_point.dtype)
        wide_s, wide_z = (repeat_groups(v, group_size, k) for v in (s, z))
        level = codes - wide_z
        radius = repeat_groups(moved, group_size, k)
        if scale.dtype == "float16":  # float32 scales are stored as they are
            radius = radius + repeat_groups(rounding(s, scale.dtype), group_size, k) * (
                np.abs(level) + repeat_groups(rounding(z, zero_point.dtype), group_size, k)
            )
        size = np.abs(wide_s) * (codes + np.abs(wide_z))
        return Rows(level * wide_s, size, radius + ARITHMETIC * size, _coarse(moved, s))

    return rows


def _coarse(moved: Array, scale: Array) -> float:
    """The largest rounding of a group's offset, relative to its scale."""
    steps = np.abs(scale)
    return float((moved / np.where(steps == 0, np.inf, steps)).max())


def nbits(
    reading: Reading,
    packed: StoredTensor,
    scale: StoredTensor,
    zero_point: StoredTensor | None,
    bits: int,
    block_size: int,
) -> Part:
    """MatMulNBits: `W = scale · (q − zero_point)`, integer zero-points; digits of C among them."""
    scale = _by_row(scale, packed.shape[0])
    zero_point = None if zero_point is None else _by_row(zero_point, packed.shape[0])

    def rows(part: slice, expert: int) -> Rows:
        codes = block_codes(_take(packed, part, expert), bits)
        blocks = codes.shape[1] // block_size
        n = len(codes)
        s = _wide(scale, part, expert).reshape(n, blocks)
        if zero_point is None:
            z = np.full((n, blocks), 2.0 ** (bits - 1))
        elif zero_point.dtype != "uint8":
            raise NotLinearError(
                f"zero-points of {bits} bits are stored as {zero_point.dtype}, not packed"
            )
        else:
            z = from_bits(_take(zero_point, part, expert).reshape(n, -1), bits, blocks)
        made = _levels(codes, s, np.asarray(z, np.float64), block_size, reading.width)
        made.radius[...] += _digit_radius(reading, s, bits, block_size, made.radius.shape)
        return made

    return rows


def _by_row(stored: StoredTensor, n: int) -> StoredTensor:
    """A tensor that may be stored flat, by its `n` rows."""
    if len(stored.shape) != 1 or stored.size % n:
        return stored
    shape = n, stored.size // n
    return dataclasses.replace(stored, shape=shape, read=lambda: stored.read().reshape(shape))


def blocks(
    packed: StoredTensor,
    scale: StoredTensor,
    zero_point: StoredTensor | None,
    bits: int,
    block_size: int,
    k: int,
) -> Part:
    """Blocked DequantizeLinear along axis 0 of `[K, N]`, transposed to rows of `[N, K]`."""
    count, n = scale.shape

    def rows(part: slice, expert: int) -> Rows:
        codes = flat_columns(packed.read(), bits, (k, n), part).T
        s = np.asarray(scale.values()[:, part].T, np.float64)
        z = np.zeros_like(s)
        if zero_point is not None:
            z = flat_columns(zero_point.read(), bits, (count, n), part).T.astype(np.float64)
        return _levels(codes, s, z, block_size, k)

    return rows


def _levels(codes: Array, scale: Array, zero: Array, block_size: int, width: int) -> Rows:
    if codes.shape[1] < width or scale.shape[1] * block_size < width:
        raise NotLinearError(f"{codes.shape[1]} stored codes a row for {width} values of x")
    wide_s, wide_z = (repeat_groups(v, block_size, width) for v in (scale, zero))
    level = codes[:, :width].astype(np.float64) - wide_z
    size = np.abs(wide_s) * (codes[:, :width] + wide_z)
    return Rows(level * wide_s, size, ARITHMETIC * size)


def _digit_radius(
    reading: Reading, scale: Array, bits: int, block_size: int, shape: tuple[int, ...]
) -> Array:
    """Half a step of the last digit, at its columns: the rest after rounding C to digits.

    The scale of a digit is at most that of the one before it over 2 (2^(b − 1) − 1), so that a
    stored scale that is too large does not widen the radius.
    """
    radius = np.zeros(shape)
    if not reading.digits:
        return radius
    (first, _), (last, width) = reading.digits[0], reading.digits[-1]
    if first % block_size or last % block_size:
        raise NotLinearError("digits of the correction do not begin with a block")
    count = -(-width // block_size)
    step = 2.0 * (2 ** (bits - 1) - 1)
    at_most = scale[:, first // block_size :][:, :count] / step ** (len(reading.digits) - 1)
    stored = scale[:, last // block_size :][:, :count]
    half = np.minimum(np.abs(stored), np.abs(at_most)) / 2 * _MARGIN
    radius[:, last : last + width] = repeat_groups(half, block_size, width)
    return radius


def correction(stored: StoredTensor, roundings: int = 1) -> Part:
    """A matrix C `[width, N]` that multiplies from the right, as rows of Cᵀ.

    `roundings`: number of roundings before it was stored.
    """

    def rows(part: slice, expert: int) -> Rows:
        weight = np.ascontiguousarray(stored.values()[:, part].T, np.float64)
        return Rows(weight, np.abs(weight), roundings * rounding(weight, stored.dtype))

    return rows


def adapter(lora_a: StoredTensor, lora_b: StoredTensor, scaling: float) -> Part:
    """`scaling · B A`, rows `[n, L]`, in float64."""

    def rows(part: slice, expert: int) -> Rows:
        a, b = _wide(lora_a, slice(None), expert), _wide(lora_b, part, expert)
        if b.shape[1] != len(a):
            raise NotLinearError(f"A {list(a.shape)} and B {list(b.shape)} do not chain")
        size = abs(scaling) * (np.abs(b) @ np.abs(a))
        return Rows(scaling * (b @ a), size, (len(a) + 32) * 2.0**-52 * size)

    return rows

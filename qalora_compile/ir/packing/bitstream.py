"""Packed storage of unsigned codes: a little-endian bit stream per row.

Row n of the packed tensor holds the codes of row n, code k in bits `k·bits … (k+1)·bits − 1` of the
row's byte stream; K is padded with zero codes to a multiple of eight, so a row takes
`ceil(K / 8) · bits` bytes. For 2, 4 and 8 bits this is the order of ONNX Runtime's MatMulNBits (low
nibble first); 3-bit codes straddle bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CODES_PER_WORD = 8
_WORD_BITS = 32
_CHUNK_ELEMENTS = 1 << 21
"""About so many codes are packed at a time: the arithmetic takes 24 bytes per code."""

_CHUNKS: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    3: (
        torch.int64,
        ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707)),
    ),
    4: (torch.int16, ((4, 0x0F0F),)),
}
"""How to give each code of a unit its byte: the integer type, and shifts with the mask after each.
Little-endian, as the stream."""


def packed_width(k: int, bits: int) -> int:
    """Bytes that hold one row of `k` codes of `bits` bits."""
    return -(-k // CODES_PER_WORD) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[N, K]` uint8, each below 2^bits, to `[N, packed_width(K, bits)]` uint8."""
    rows = max(1, _CHUNK_ELEMENTS // max(1, codes.shape[1]))
    if codes.shape[0] <= rows:
        return _pack_rows(codes, bits)
    return torch.cat([_pack_rows(part, bits) for part in codes.split(rows)])


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    padded = functional.pad(codes, (0, -k % CODES_PER_WORD))
    if bits == 8:
        return padded.clone()
    words = padded.reshape(n, -1, CODES_PER_WORD).to(torch.int64)
    shifts = torch.arange(CODES_PER_WORD, device=codes.device) * bits
    word = (words << shifts).sum(-1, keepdim=True)
    byte_shifts = torch.arange(bits, device=codes.device) * 8
    return ((word >> byte_shifts) & 0xFF).to(torch.uint8).reshape(n, -1)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The same bit stream in words: `[N, K]` to `[N, ceil(K · bits / 32)]` int32, little-endian."""
    words = -(-codes.shape[1] * bits // _WORD_BITS)
    stream = pack_codes(codes.contiguous(), bits)
    padded = functional.pad(stream, (0, max(0, words * 4 - stream.shape[1])))
    # Flat: a single row counts as contiguous with any stride, but a view as words refuses some.
    return padded[:, : words * 4].flatten().view(torch.int32).reshape(-1, words)


def unpack_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """Unpack `[N, packed_width(k, bits)]` uint8 to codes `[N, k]` uint8; undoes `pack_codes`."""
    return unpack_into(packed, bits, torch.uint8)[:, :k]


def unpack_into(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Unpack to a fresh tensor of `dtype`, padding codes included: `[N, ceil(K / 8) · 8]`.

    The smallest unit of complete codes (one byte for 2, 4 and 8 bits, three for 3 bits) is read
    into an integer with a byte for each of its codes, and halves of it are moved apart until each
    code has its byte. That takes a few vectorised operations on full rows and no strided write.
    """
    if bits == 8:
        return packed.to(dtype, copy=True)
    wide, steps = _CHUNKS[bits]
    unit = 3 if bits == 3 else 1
    bytes_ = packed.unflatten(1, (-1, unit)).unbind(-1)
    # A new tensor: a converted one may have odd strides, and could not be viewed as bytes.
    word = torch.empty(bytes_[0].shape, dtype=wide, device=packed.device).copy_(bytes_[-1])
    for byte in reversed(bytes_[:-1]):
        word.bitwise_left_shift_(8).bitwise_or_(byte)
    for shift, mask in steps:
        word.bitwise_or_(word << shift).bitwise_and_(mask)
    codes: Tensor = word.view(torch.uint8)
    return codes.to(dtype)

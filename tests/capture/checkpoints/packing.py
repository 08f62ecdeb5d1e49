"""GPTQ's and AWQ's packing, written bit by bit: a check of readers that work on complete
tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes `[R, C]` as int32 words `[R, C · bits / 32]`, code after code."""
    rows = []
    for row in codes.tolist():
        stream = 0
        for place, code in enumerate(row):
            stream |= code << place * bits
        words = len(row) * bits // 32
        rows.append([stream >> 32 * word & 0xFFFFFFFF for word in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def pack_awq(values: Tensor) -> Tensor:
    """`[R, N]` as int32 `[R, N / 8]`: of eight outputs, 0, 2, 4, 6 first, then 1, 3, 5, 7."""
    rows = []
    for row in values.tolist():
        words = []
        for first in range(0, len(row), 8):
            eight = row[first : first + 8]
            chosen = [*eight[::2], *eight[1::2]]
            words.append(sum(code << 4 * place for place, code in enumerate(chosen)))
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def quantize_integer_zero(
    weight: Tensor, bits: int, group: int, *, symmetric: bool
) -> tuple[Tensor, ...]:
    """Codes `[N, K]`, scales and integer zero-points `[N, L]`, of a weight whose groups are
    full."""
    grouped = weight.double().unflatten(1, (-1, group))
    top = 2**bits - 1
    if symmetric:
        scale = grouped.abs().amax(-1) * 2 / top
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round()
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, top).flatten(1)
    return codes.to(torch.uint8), scale.float(), zero.to(torch.uint8)

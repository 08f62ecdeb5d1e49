"""The unchanged codes of a GGUF file's tensors (formats: llama.cpp, ggml/docs and gguf-py).

=======  =================================  =================================================
Q4_0     `w = d · (q − 8)`                  4 bits, groups of 32
Q4_1     `w = d · q + m`                    4 bits, groups of 32
Q5_0     `w = d · (q − 16)`                 5 bits, kept as 8-bit codes
Q5_1     `w = d · q + m`                    5 bits, kept as 8-bit codes
Q8_0     `w = d · q`, q from −128 to 127    8 bits, groups of 32
=======  =================================  =================================================

d and m are float16, which float32 holds exactly. Formats with nested scales (K-quants, I-quants)
are not group-affine codes with one level of scales, so they are dequantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.checkpoint_codes import CheckpointCodes, CheckpointWeight
from qalora_compile.optional import require
from qalora_compile.untrusted.gguf_header import check_gguf
from qalora_compile.untrusted.gguf_reader import open_gguf

_BLOCK = 32
_FLOAT = ("F16", "F32", "F64", "BF16")
_Bytes = NDArray[np.uint8]
_Fields = tuple[_Bytes, _Bytes, _Bytes | None]
"""Codes `[blocks, 32]`, the bytes of d, and those of m or None."""


def read_gguf_codes(path: Path) -> tuple[CheckpointCodes, tuple[str, ...]]:
    """Every tensor whose codes can be kept, and notes on the others.

    Raises:
        UserInputError: the file cannot be read, or a tensor is truncated.
        UnsupportedError: the package gguf is missing, or the file has another version.
    """
    require("gguf", extra="hf", purpose="read GGUF files")
    found, widened, dequantized = CheckpointCodes(), Counter[str](), Counter[str]()
    check_gguf(path)
    try:
        tensors = open_gguf(path).tensors
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserInputError(
            f"cannot read {path.name}: {error}",
            where=str(path),
            hint="the file may be truncated: fetch it again",
        ) from error
    for tensor in tensors:
        form = tensor.tensor_type.name
        if form in _FORMS and len(tensor.shape) > 1:
            found.add(CheckpointWeight(_decode(tensor, form, path), form))
            widened[form] += form.startswith("Q5")
        elif form not in _FORMS and form not in _FLOAT:
            dequantized[form] += 1
    notes = [
        f"{count} tensors in {form} were dequantized: codes with nested scales cannot be kept"
        for form, count in sorted(dequantized.items())
    ]
    notes += [
        f"{count} tensors in {form} keep their 5-bit codes in 8 bits each"
        for form, count in sorted(widened.items())
        if count
    ]
    return found, tuple(notes)


def _decode(tensor: Any, form: str, path: Path) -> GroupAffine:
    """One tensor `[.., N, K]`, leading axes joined with N."""
    layout, k = _FORMS[form], int(tensor.shape[0])
    blocks = np.asarray(tensor.data).reshape(-1, layout.size)
    n = int(np.prod(tensor.shape[1:]))
    if k % _BLOCK or len(blocks) * _BLOCK != n * k:
        raise UserInputError(
            f"the tensor {tensor.name} is {n}×{k} in {form} and has {len(blocks)} blocks of "
            f"{_BLOCK}",
            where=str(path),
            hint="the file may be truncated: fetch it again",
        )
    codes, d, m = layout.split(blocks)
    scale = _half(d)
    offset = scale * -layout.zero if m is None else _half(m)
    shape = (n, k // _BLOCK)
    return GroupAffine(
        torch.from_numpy(codes.reshape(n, k)),
        torch.from_numpy(scale.reshape(shape)),
        torch.from_numpy(offset.reshape(shape)),
        layout.bits,
        _BLOCK,
    )


def _half(raw: _Bytes) -> NDArray[np.float32]:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


@dataclass(frozen=True)
class _Layout:
    """A format: bytes of a block, bits of the kept codes, the zero-point, the fields."""

    size: int
    bits: int
    zero: int
    split: Callable[[_Bytes], _Fields]


def _nibbles(raw: _Bytes) -> _Bytes:
    """16 bytes as 32 codes: first all low nibbles, then all high ones."""
    return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=1)


def _fifth(raw: _Bytes) -> _Bytes:
    """4 bytes as the fifth bits of 32 codes, in their position."""
    return np.unpackbits(raw, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: _Bytes) -> _Fields:
    return _nibbles(b[:, 2:]), b[:, :2], None


def _q4_1(b: _Bytes) -> _Fields:
    return _nibbles(b[:, 4:]), b[:, :2], b[:, 2:4]


def _q5_0(b: _Bytes) -> _Fields:
    return _nibbles(b[:, 6:]) | _fifth(b[:, 2:6]), b[:, :2], None


def _q5_1(b: _Bytes) -> _Fields:
    return _nibbles(b[:, 8:]) | _fifth(b[:, 4:8]), b[:, :2], b[:, 2:4]


def _q8_0(b: _Bytes) -> _Fields:
    return b[:, 2:] ^ np.uint8(0x80), b[:, :2], None


_FORMS = {
    "Q4_0": _Layout(18, 4, 8, _q4_0),
    "Q4_1": _Layout(20, 4, 0, _q4_1),
    "Q5_0": _Layout(22, 8, 16, _q5_0),
    "Q5_1": _Layout(24, 8, 0, _q5_1),
    "Q8_0": _Layout(34, 8, 128, _q8_0),
}

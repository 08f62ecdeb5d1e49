"""HQQ checkpoints in safetensors: `w = (q − zero) · scale` (package hqq, `HQQLinear.state_dict`).

With axis 1 the weight is split into rows of one group, `[N · L, g]`. A word packs rows that are far
apart, the first in its highest bits. Every module stores its bits, group size and shape as small
tensors. With `view_as_float` the bytes of the words are stored as floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.checkpoints.base import (
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    small_numbers,
    take,
)
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointWeight

_PARTS = ("W_q", "scale", "zero", "nbits", "group_size", "shape", "axis")
_SETTINGS = (
    *_PARTS,
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4}
_VIEWED = "view_as_float"


def decode_hqq(tensors: Tensors, config: Mapping[str, Any]) -> Decoded:
    """Every weight that has `W_q`.

    Raises:
        UserInputError: a tensor is missing, or its shape does not fit the others.
        UnsupportedError: the groups are along the outputs (axis 0), there is 1 bit, or scales are
            quantized.
    """
    weights, used = {}, set()
    for name in [name for name in tensors if name.endswith(".W_q")]:
        module = name.removesuffix(".W_q")
        parts = take(tensors, module, _PARTS)
        viewed = tensors.get(f"{module}.{_VIEWED}")
        if viewed is not None and small_numbers(module, _VIEWED, viewed, 1) != [0]:
            parts["W_q"] = _words(module, parts)
        weights[module] = _decode(module, parts)
        used |= {f"{module}.{part}" for part in _SETTINGS} & set(tensors)
    return Decoded(weights, frozenset(used))


def _decode(module: str, parts: Mapping[str, Tensor]) -> CheckpointWeight:
    (bits,), (axis,), (group,) = (
        small_numbers(module, part, parts[part], 1) for part in ("nbits", "axis", "group_size")
    )
    n, k = small_numbers(module, "shape", parts["shape"], 2)
    if axis != 1 or bits not in _PER_WORD:
        raise UnsupportedError(
            f"{bits} bits in groups along axis {axis}",
            where=module,
            hint="quantize with axis=1 and 2, 3, 4 or 8 bits: adapters fold into groups of inputs",
        )
    packed = parts["W_q"]
    check_matrix(module, "W_q", packed, _word_type(bits), f"words of {bits}-bit codes")
    complete = min(group, n, k) >= 1 and k % group == 0
    if not complete or list(packed.shape) != [-(-n * k // group // _PER_WORD[bits]), group]:
        raise UserInputError(
            f"{module}.W_q is {list(packed.shape)}, {_PER_WORD[bits]} rows of codes in one, and "
            f"{n}×{k} in groups of {group} were wanted",
            where=f"{module}.W_q",
            hint="the file may be truncated: fetch it again",
        )
    codes = _unpack(packed, bits)[: n * k // group].reshape(n, k)
    scale, zero = (
        _per_group(module, part, parts[part], n, k // group) for part in ("scale", "zero")
    )
    return CheckpointWeight(
        affine_of(module, codes, scale, -zero * scale, bits, group), f"HQQ {bits} bits"
    )


def _per_group(module: str, part: str, values: Tensor, n: int, groups: int) -> Tensor:
    """`[N · L, 1]` as `[N, L]`, float32."""
    if values.numel() != n * groups or not values.is_floating_point():
        raise UserInputError(
            f"{module}.{part} is {values.dtype} {list(values.shape)}, and one value for each of "
            f"{n * groups} groups was wanted",
            where=f"{module}.{part}",
            hint="quantized scales and zero-points cannot be read; else fetch the file again",
        )
    return values.float().reshape(n, groups)


def _word_type(bits: int) -> torch.dtype:
    return torch.int32 if bits == 3 else torch.uint8


def _words(module: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The packed words of codes that are stored as floats.

    Raises:
        UserInputError: their rows are not a multiple of a word.
    """
    (bits,) = small_numbers(module, "nbits", parts["nbits"], 1)
    packed, word = parts["W_q"], _word_type(bits)
    check_matrix(module, "W_q", packed, None, f"[.., ..], as {_VIEWED} says")
    if packed.shape[1] * packed.itemsize % word.itemsize:
        raise UserInputError(
            f"{module}.W_q is {packed.dtype} {list(packed.shape)}, and its rows are "
            f"not a multiple of a word of {bits}-bit codes",
            where=f"{module}.W_q",
        )
    return packed.contiguous().view(word)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Rows of one group each, uint8; with 3 bits, followed by rows of padding."""
    each = _PER_WORD[bits]
    words = packed.to(torch.int64) & 0xFFFFFFFF
    parts = [(words >> bits * (each - 1 - at)) & (2**bits - 1) for at in range(each)]
    return torch.cat(parts).to(torch.uint8)

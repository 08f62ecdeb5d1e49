"""HQQ checkpoints in safetensors: `w = (q − zero) · scale` (package hqq, `HQQLinear.state_dict`).

With axis 1 the weight is cut into rows of one group, `[N · L, g]`; the packing puts rows far apart
into one word, the first in its highest bits. Every module brings its own bits, group size and shape
as small tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.stored.base import Decoded, Tensors, affine_of, take
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.stored_codes import StoredWeight

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


def decode_hqq(tensors: Tensors, config: Mapping[str, Any]) -> Decoded:
    """Every weight that has `W_q`.

    Raises:
        UserInputError: a tensor is missing or of another shape than the others say.
        UnsupportedError: groups along the outputs (axis 0), 1 bit, or quantized scales.
    """
    weights, used = {}, set()
    for name in [name for name in tensors if name.endswith(".W_q")]:
        module = name.removesuffix(".W_q")
        weights[module] = _decode(module, take(tensors, module, _PARTS))
        used |= {f"{module}.{part}" for part in _SETTINGS} & set(tensors)
    return Decoded(weights, frozenset(used))


def _decode(module: str, parts: Mapping[str, Tensor]) -> StoredWeight:
    bits, axis = int(parts["nbits"]), int(parts["axis"])
    n, k = (int(size) for size in parts["shape"].tolist())
    group = int(parts["group_size"])
    if axis != 1 or bits not in _PER_WORD:
        raise UnsupportedError(
            f"{bits} bits in groups along axis {axis}",
            where=module,
            hint="quantize with axis=1 and 2, 3, 4 or 8 bits: adapters fold into groups of inputs",
        )
    rows = _unpack(parts["W_q"], bits)
    if group < 1 or k % group or rows.shape[1] != group or len(rows) < n * k // group:
        raise UserInputError(
            f"{module}.W_q holds {len(rows)} groups of {rows.shape[1]}, and {n}×{k} in groups of "
            f"{group} were wanted",
            where=f"{module}.W_q",
            hint="the file may be truncated: fetch it again",
        )
    codes = rows[: n * k // group].reshape(n, k)
    scale, zero = (
        _per_group(module, part, parts[part], n, k // group) for part in ("scale", "zero")
    )
    return StoredWeight(
        affine_of(module, codes, scale, -zero * scale, bits, group), f"HQQ {bits} bits"
    )


def _per_group(module: str, part: str, values: Tensor, n: int, groups: int) -> Tensor:
    """`[N · L, 1]` as `[N, L]`, float32."""
    if values.numel() != n * groups:
        raise UserInputError(
            f"{module}.{part} is {list(values.shape)}, and one value for each of {n * groups} "
            "groups was wanted",
            where=f"{module}.{part}",
            hint="quantized scales and zero-points cannot be read; else fetch the file again",
        )
    return values.float().reshape(n, groups)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Rows of one group each, uint8; 3 bits: with rows of padding at the end."""
    each = _PER_WORD[bits]
    words = packed.to(torch.int64) & 0xFFFFFFFF
    parts = [(words >> bits * (each - 1 - at)) & (2**bits - 1) for at in range(each)]
    return torch.cat(parts).to(torch.uint8)

"""AWQ checkpoints of the layout `gemm`: `w = scale · (q − zero_point)`, 4 bits.

`qweight` is int32 `[K, N / 8]`, `qzeros` int32 `[L, N / 8]`: eight outputs in a word, the even ones
in its lower half, the odd ones in its upper half; `scales` is `[L, N]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.checkpoints.base import (
    CONFIG,
    ONE_GROUP_A_ROW,
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    read_count,
    section,
    take,
)
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointWeight

_PARTS = ("qweight", "qzeros", "scales")
_BITS = 4
_GROUP_SIZE = 128
"""The default group size."""
_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The order of the eight outputs of a word, from its lowest four bits up."""


def decode_awq(tensors: Tensors, config: Mapping[str, Any]) -> Decoded:
    """Every weight that has `qweight`.

    Raises:
        UserInputError: a tensor is missing, or its shape does not fit the others.
        UnsupportedError: the bits are not 4, or the layout is another.
    """
    options = {"group_size": _GROUP_SIZE, **section(config, "quantization_config", CONFIG)}
    bits, layout = options.get("bits"), str(options.get("version", "gemm")).lower()
    if bits != _BITS or layout != "gemm":
        raise UnsupportedError(
            f"an AWQ checkpoint of {bits} bits in the layout {layout!r}",
            where=CONFIG,
            hint="4 bits in the layout 'gemm' can be read",
        )
    group_size = read_count(options, "group_size", CONFIG, rows=True)
    weights, used = {}, set[str]()
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = take(tensors, module, _PARTS)
        weights[module] = _decode(module, parts, group_size)
        used |= {f"{module}.{part}" for part in _PARTS}
    return Decoded(weights, frozenset(used))


def _decode(module: str, parts: Mapping[str, Tensor], group_size: int) -> CheckpointWeight:
    codes = _unpack(module, "qweight", parts["qweight"]).t()
    zeros = _unpack(module, "qzeros", parts["qzeros"]).t().float()
    check_matrix(module, "scales", parts["scales"], None, "[L, N]")
    scale = parts["scales"].t().float()
    if zeros.shape != scale.shape:
        raise UserInputError(
            f"{module}.qzeros is {list(parts['qzeros'].shape)}, but scales of "
            f"{list(parts['scales'].shape)} need {[scale.shape[1], scale.shape[0] // 8]}",
            where=f"{module}.qzeros",
        )
    group = codes.shape[1] if group_size == ONE_GROUP_A_ROW else group_size
    affine = affine_of(module, codes, scale, -scale * zeros, _BITS, group)
    return CheckpointWeight(affine, "AWQ 4 bits")


def _unpack(module: str, part: str, packed: Tensor) -> Tensor:
    """`[R, N / 8]` int32 to `[R, N]` uint8."""
    check_matrix(module, part, packed, torch.int32, "[.., N / 8]")
    codes = torch.empty((*packed.shape, 8), dtype=torch.uint8)
    for place, output in enumerate(_OUTPUTS):
        codes[..., output] = ((packed >> 4 * place) & 15).to(torch.uint8)
    return codes.flatten(1)

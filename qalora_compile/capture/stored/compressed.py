"""compressed-tensors checkpoints of format `pack-quantized`: `w = scale · (q − zero_point)`.

`weight_packed` is int32 `[N, K · bits / 32]`, a little-endian stream of codes along K, each plus
2^(bits − 1); `weight_zero_point` the same along N, `[N · bits / 32, L]`, absent where they are all
0; `weight_scale` `[N, L]`; `weight_shape` (N, K).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.stored.base import Decoded, Tensors, affine_of, take, unpack_stream
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.stored_codes import StoredWeight

_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_ZERO = "weight_zero_point"


def decode_compressed(tensors: Tensors, config: Mapping[str, Any]) -> Decoded:
    """Every weight that has `weight_packed`.

    Raises:
        UserInputError: a tensor is missing or of another shape than the others say.
        UnsupportedError: another format, or a layer that is not quantized in groups.
    """
    options = config["quantization_config"]
    if options.get("format") != "pack-quantized":
        raise UnsupportedError(
            f"a compressed-tensors checkpoint of format {options.get('format')!r}",
            hint="the format pack-quantized can be read",
        )
    weights, used = {}, set[str]()
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        bits, group_size = _settings(module, options)
        parts = take(tensors, module, _PARTS)
        zeros = tensors.get(f"{module}.{_ZERO}")
        weights[module] = _decode(module, parts, zeros, bits, group_size)
        used |= {f"{module}.{part}" for part in (*_PARTS, _ZERO)} & set(tensors)
    return Decoded(weights, frozenset(used))


def _settings(module: str, options: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group size of a module.

    Raises:
        UnsupportedError: it is in no group of the configuration, or in one of another kind.
    """
    for group in options.get("config_groups", {}).values():
        if any(_meant(target, module) for target in group.get("targets", ())):
            weights = group["weights"]
            if weights.get("strategy") == "group" and weights.get("type") == "int":
                return int(weights["num_bits"]), int(weights["group_size"])
            break
    raise UnsupportedError(
        f"{module} is not quantized to integers in groups", where=module, hint="give a float model"
    )


def _meant(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)


def _decode(
    module: str, parts: Mapping[str, Tensor], zeros: Tensor | None, bits: int, group_size: int
) -> StoredWeight:
    n, k = (int(size) for size in parts["weight_shape"].tolist())
    codes = _unpack(module, "weight_packed", parts["weight_packed"], bits, k)
    scale = parts["weight_scale"].float()
    level = torch.full_like(scale, 2 ** (bits - 1))
    if zeros is not None:
        level = _unpack(module, _ZERO, zeros.t(), bits, n).t().float()
    if level.shape != scale.shape:
        raise UserInputError(
            f"{module}.{_ZERO} is for {list(level.shape)} groups, and {module}.weight_scale is "
            f"{list(scale.shape)}",
            where=f"{module}.{_ZERO}",
        )
    affine = affine_of(module, codes, scale, -scale * level, bits, group_size)
    return StoredWeight(affine, f"compressed-tensors {bits} bits")


def _unpack(module: str, part: str, packed: Tensor, bits: int, count: int) -> Tensor:
    """Rows of int32 words `[R, ceil(count · bits / 32)]` to `[R, count]` uint8."""
    words = -(-count * bits // 32)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != words:
        raise UserInputError(
            f"{module}.{part} is {packed.dtype} {list(packed.shape)}, and {count} codes of {bits} "
            f"bits take {words} int32 words",
            where=f"{module}.{part}",
            hint="the file may be truncated: fetch it again",
        )
    return unpack_stream(packed.contiguous().view(torch.uint8), bits, count)

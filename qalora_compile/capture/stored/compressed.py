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

from qalora_compile.capture.stored.base import (
    CONFIG,
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    code_width,
    section,
    small_numbers,
    take,
    unpack_stream,
    whole_number,
)
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
    options = section(config, "quantization_config", CONFIG)
    if options.get("format") != "pack-quantized":
        raise UnsupportedError(
            f"a compressed-tensors checkpoint of format {options.get('format')!r}",
            where=CONFIG,
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
        UserInputError: the configuration is malformed.
        UnsupportedError: it is in no group of the configuration, or in one of another kind.
    """
    groups = section(options, "config_groups", CONFIG)
    for name in groups:
        group, where = section(groups, name, CONFIG), f"{CONFIG}: {name}"
        targets = group.get("targets") or []
        if not isinstance(targets, list):
            raise UserInputError(f"targets is {targets!r}", where=where, hint="give a list")
        if any(_meant(target, module, where) for target in targets):
            weights = section(group, "weights", where)
            if weights.get("strategy") == "group" and weights.get("type") == "int":
                bits = code_width(weights, "num_bits", where)
                return bits, whole_number(weights, "group_size", where)
            break
    raise UnsupportedError(
        f"{module} is not quantized to integers in groups", where=module, hint="give a float model"
    )


def _meant(target: object, module: str, where: str) -> bool:
    text = str(target)
    if not text.startswith("re:"):
        return text in ("Linear", module)
    try:
        return re.match(text.removeprefix("re:"), module) is not None
    except re.error as error:
        raise UserInputError(f"the target {text!r} cannot be read: {error}", where=where) from error


def _decode(
    module: str, parts: Mapping[str, Tensor], zeros: Tensor | None, bits: int, group_size: int
) -> StoredWeight:
    n, k = small_numbers(module, "weight_shape", parts["weight_shape"], 2)
    check_matrix(module, "weight_scale", parts["weight_scale"], None, "[N, L]")
    codes = _unpack(module, "weight_packed", parts["weight_packed"], bits, k)
    scale = parts["weight_scale"].float()
    level = torch.full_like(scale, 2 ** (bits - 1))
    if zeros is not None:
        check_matrix(module, _ZERO, zeros, torch.int32, "[N · bits / 32, L]")
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
    check_matrix(module, part, packed, torch.int32, "words, rows of codes")
    words = -(-count * bits // 32)
    if packed.shape[1] != words:
        raise UserInputError(
            f"{module}.{part} is {list(packed.shape)}, and {count} codes of {bits} bits take "
            f"{words} int32 words",
            where=f"{module}.{part}",
            hint="the file may be truncated: fetch it again",
        )
    return unpack_stream(packed.contiguous().view(torch.uint8), bits, count)

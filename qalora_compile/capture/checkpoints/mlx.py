"""MLX affine checkpoints: `w = scale · q + bias` (`mlx.core.quantize`, mode `affine`).

`weight` is uint32 `[N, K · bits / 32]`, a little-endian stream of codes along K; `scales` and
`biases` are `[N, K / group_size]`. Layers may have their own bits and group size in `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qalora_compile.capture.checkpoints.base import (
    CONFIG,
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    code_width,
    read_count,
    section,
    take,
    unpack_stream,
    widened_notes,
)
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointWeight

KEY = "quantization"
_PARTS = ("weight", "scales", "biases")


def decode_mlx(tensors: Tensors, config: Mapping[str, Any]) -> Decoded:
    """Every weight that has scales.

    Raises:
        UserInputError: a tensor is missing, or its shape does not fit the others.
        UnsupportedError: the mode is not affine.
    """
    options = section(config, KEY, CONFIG)
    _check_promises(tensors, options)
    weights, widths, used = {}, {}, set()
    for scales in [name for name in tensors if name.endswith(".scales")]:
        module = scales.removesuffix(".scales")
        own = options.get(module)
        mine = {**options, **(own if isinstance(own, dict) else {})}
        if (mode := mine.get("mode", "affine")) != "affine":
            raise UnsupportedError(
                f"the mode {mode} has no codes with a scale and an offset",
                where=module,
                hint="convert with mode affine",
            )
        parts = take(tensors, module, _PARTS)
        packed, scale, bias = (parts[part] for part in _PARTS)
        bits, group = code_width(mine, "bits", module), read_count(mine, "group_size", module)
        check_matrix(module, "weight", packed, torch.uint32, "[N, K · bits / 32]")
        codes = unpack_stream(packed.view(torch.uint8), bits, packed.shape[1] * 32 // bits)
        affine = affine_of(module, codes, scale, bias, bits, group)
        weights[module], widths[module] = CheckpointWeight(affine, f"MLX {bits} bits"), bits
        used |= {f"{module}.{part}" for part in _PARTS}
    return Decoded(weights, frozenset(used), widened_notes(weights, widths))


def _check_promises(tensors: Tensors, options: Mapping[str, Any]) -> None:
    """Check that the layers with codes are those that the configuration names.

    Raises:
        UserInputError: a layer with codes or its own options has no scales, or one with scales is
            in float according to the configuration.
    """
    words = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint32}
    coded = {name.removesuffix(".weight") for name in words if name.endswith(".weight")}
    named = {name for name, own in options.items() if isinstance(own, dict)}
    for module in sorted(coded | {name for name in named if f"{name}.weight" in tensors}):
        take(tensors, module, _PARTS)
    for module in (name for name, own in options.items() if own is False):
        if f"{module}.scales" in tensors:
            raise UserInputError(
                f"{module} is quantized, but {CONFIG} says that it is not", where=module
            )

"""`write_mlx`: MLX's affine mode, which is our form: `scales · q + biases` per group of a row.

`<layer>.weight` holds the codes, one little-endian bit stream per row in words of 32 bits, next to
`scales` and `biases`. `config.json` holds bits and group size, and those of layers that differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import Capability, StoredTensor, partly
from qalora_compile.exporters.checkpoints.named_tensors import WEIGHT, Layer, stored_affine
from qalora_compile.exporters.checkpoints.packed_folder import (
    PackedFormat,
    exactness,
    first_divisor,
    most_common,
    packed_capabilities,
)
from qalora_compile.ir.packing.bitstream import pack_words

GROUPS = (128, 64, 32)
"""Group sizes that MLX has kernels for, largest first."""


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the format keeps each property of a program."""
    exact = exactness(spec)
    own = {
        "groups": partly("32, 64, 128; multiples are cut", exact),
        "tail groups": partly("tails of a multiple of 32", exact),
        "other architectures": Capability("exact", "as far as mlx-lm knows them"),
    }
    return packed_capabilities(spec, own)


def _misfit(layer: Layer) -> str:
    if first_divisor(layer, GROUPS):
        return ""
    return f"MLX has no groups of {layer.group_size} in rows of {layer.site.k}"


def _pack(layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Tensor], StoredTensor]:
    group_size = first_divisor(layer, GROUPS)
    affine = layer.cut(group_size)
    words = pack_words(affine.codes, layer.bits).view(torch.uint32)
    scale, offset = affine.scale.to(dtype), affine.offset.to(dtype)
    form = f"affine {layer.bits} bits, groups of {group_size}"
    row = stored_affine(layer.name, form, affine, scale, offset)
    return {WEIGHT: words, ".scales": scale, ".biases": offset}, row


def quantization(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The entry of `config.json`: bits and group size, and the layers that have others."""
    shapes = {layer.name: (layer.bits, first_divisor(layer, GROUPS)) for layer in layers}
    bits, group_size = most_common(shape for shape in shapes.values() if shape[1])
    value: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for name, shape in shapes.items():
        if not shape[1]:
            value[name] = False
        elif shape != (bits, group_size):
            value[name] = {"group_size": shape[1], "bits": shape[0], "mode": "affine"}
    return value


write_mlx = PackedFormat(
    reader="mlx-lm",
    misfit=_misfit,
    pack=_pack,
    # by both names, as mlx-lm writes it: mistral.rs reads the second one
    config=lambda layers: dict.fromkeys(
        ("quantization", "quantization_config"), quantization(layers)
    ),
    tag="mlx",
).write
"""Write a folder that mlx-lm loads."""

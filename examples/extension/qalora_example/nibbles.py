"""Reader `nibbles`: checkpoints with two 4-bit codes a byte, the first in the low half.

`<layer>.nibbles` is uint8 `[N, K / 2]`; `<layer>.scale` and `<layer>.low` are floats `[N, L]`:
`w = scale · q + low`. `quantization_config` of `config.json` says `group_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qalora_compile import extend

_PARTS = ("nibbles", "scale", "low")


def read_nibbles(
    tensors: extend.Tensors, config: Mapping[str, Any], folder: extend.OpenFolder
) -> extend.Decoded:
    """Every weight that has nibbles.

    Raises:
        UserInputError: a tensor is missing, or of another shape or dtype than the others say.
    """
    options = extend.section(config, "quantization_config", "config.json")
    group = extend.read_count(options, "group_size", "config.json")
    weights, used = {}, set()
    for name in [name for name in tensors if name.endswith(".nibbles")]:
        module = name.removesuffix(".nibbles")
        packed, scale, low = (extend.take(tensors, module, _PARTS)[part] for part in _PARTS)
        extend.check_matrix(module, "nibbles", packed, torch.uint8, "[N, K / 2]")
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        affine = extend.affine_of(module, codes, scale, low, 4, group)
        weights[module] = extend.CheckpointWeight(affine, "nibbles")
        used |= {f"{module}.{part}" for part in _PARTS}
    return extend.Decoded(weights, frozenset(used))

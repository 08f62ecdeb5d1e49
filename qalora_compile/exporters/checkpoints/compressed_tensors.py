"""`write_compressed`: compressed-tensors' `pack-quantized`, for integer zero-points.

Codes and zero-points are packed as little-endian bit streams in words of 32 bits, codes along K,
zero-points along N. The library treats them as signed numbers and adds 2^(bits − 1) before it
packs them, so the stored value is our unsigned code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import Capability, StoredTensor, unsupported
from qalora_compile.exporters.checkpoints.named_tensors import WEIGHT, Layer, stored_affine
from qalora_compile.exporters.checkpoints.packed_folder import PackedFormat, packed_capabilities
from qalora_compile.ir.packing.bitstream import pack_words
from qalora_compile.ir.site_plan import EMBEDDING


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the format keeps each property of a program."""
    own = {
        "real zero-point": unsupported("integers only; others are refused"),
        "tail groups": Capability("exact", "all groups are cut to gcd(g, K)"),
    }
    return packed_capabilities(spec, own)


def _misfit(layer: Layer) -> str:
    table = layer.site.kind == EMBEDDING
    return "an embedding table: the format has codes for linear layers only" if table else ""


def _pack(layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Tensor], StoredTensor]:
    affine, zeros = layer.cut(layer.unit), layer.cut_zero_points(layer.unit)
    scale = affine.scale.to(dtype)
    tensors = {
        f"{WEIGHT}_packed": pack_words(affine.codes, layer.bits),
        f"{WEIGHT}_scale": scale,
        f"{WEIGHT}_zero_point": pack_words(zeros.t(), layer.bits).t(),
        f"{WEIGHT}_shape": torch.tensor(affine.codes.shape),
    }
    form = f"pack-quantized {layer.bits} bits, groups of {layer.unit}"
    offset = -scale.double() * zeros.double()
    return tensors, stored_affine(layer.name, form, affine, scale, offset)


def quantization_config(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The entry of `config.json`: one configuration group for each kind of layer."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for layer in layers:
        if not _misfit(layer):
            kinds.setdefault((layer.bits, layer.unit), []).append(layer.name)
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for number, ((bits, group_size), names) in enumerate(kinds.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


write_compressed = PackedFormat(
    reader="compressed-tensors as written here",
    misfit=_misfit,
    pack=_pack,
    config=lambda layers: {"quantization_config": quantization_config(layers)},
    has_real_zeros=False,
).write
"""Write a folder that compressed-tensors loads, and so does what is built on it (vLLM)."""

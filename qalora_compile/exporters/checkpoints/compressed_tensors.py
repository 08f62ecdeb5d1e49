"""`write_compressed`: compressed-tensors' `pack-quantized`, for whole zero-points.

Codes and zero-points are packed as little-endian bit streams in words of 32 bits, codes along K,
zero-points along N. The library thinks of them as signed numbers, and adds 2^(bits − 1) before it
packs: what is stored is our unsigned code.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import (
    EXACT,
    NO_ORDER,
    Capability,
    StoredTensor,
    rounds,
    unsupported,
)
from qalora_compile.exporters.checkpoints.hf_folder import (
    DTYPES,
    FolderWriter,
    add_floats,
    add_layers,
    check_parameters,
)
from qalora_compile.exporters.checkpoints.named_tensors import (
    WEIGHT,
    Checkpoint,
    Layer,
    refuse_if_none_fits,
    refuse_sorted,
    refuse_transposed,
    stored_affine,
)
from qalora_compile.ir.packing.bitstream import pack_words
from qalora_compile.ir.site_plan import EMBEDDING


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """What the format does to each property of a program."""
    exact = EXACT if spec.parameter_dtype == "float32" else rounds(spec.parameter_dtype)
    return {
        "codes of 4, 3 and 2 bits": EXACT,
        "codes of 8 bits": EXACT,
        "scale": exact,
        "real zero-point": unsupported("whole numbers only; others are refused"),
        "groups": EXACT,
        "tail groups": Capability("exact", "all groups are cut to gcd(g, K)"),
        "activation order": NO_ORDER,
        "matrices of floats": exact,
        "vectors": exact,
        "tied weights": EXACT,
        "other architectures": Capability("exact", "linear layers stored [N, K]"),
    }


def write_compressed(checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write a folder that compressed-tensors and what is built on it (vLLM) load.

    Raises:
        UnsupportedError: a zero-point is no whole number, or a weight is stored `[K, N]`, or was
            quantized in activation order.
        UserInputError: float16 was asked for and cannot hold a value.
    """
    dtype, layers = DTYPES[spec.parameter_dtype], checkpoint.layers
    refuse_transposed(layers, "compressed-tensors")
    refuse_if_none_fits(layers, _misfit)
    refuse_sorted(layers, _misfit, "what is written here")
    check_parameters(layers, dtype, _misfit)
    for layer in layers:
        if not _misfit(layer):
            layer.zero_points()
    writer = FolderWriter(folder)
    rows = [*add_layers(writer, layers, dtype, _misfit, partial(_add_layer, writer, dtype))]
    rows += add_floats(writer, checkpoint, dtype)
    changes = {"dtype": spec.parameter_dtype, "quantization_config": quantization_config(layers)}
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows


def _misfit(layer: Layer) -> str:
    table = layer.site.kind == EMBEDDING
    return "a table: written are linear layers on codes" if table else ""


def _add_layer(writer: FolderWriter, dtype: torch.dtype, layer: Layer) -> StoredTensor:
    affine, zeros = layer.cut(layer.unit), layer.cut_zero_points(layer.unit)
    scale = affine.scale.to(dtype)
    tensors = {
        f"{WEIGHT}_packed": pack_words(affine.codes, layer.bits),
        f"{WEIGHT}_scale": scale,
        f"{WEIGHT}_zero_point": pack_words(zeros.t(), layer.bits).t(),
        f"{WEIGHT}_shape": torch.tensor(affine.codes.shape),
    }
    for name, tensor in tensors.items():
        writer.add(f"{layer.name}{name}", tensor)
    form = f"pack-quantized {layer.bits} bits, groups of {layer.unit}"
    return stored_affine(layer.name, form, affine, scale, -scale.double() * zeros.double())


def quantization_config(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """What the folder says of its layers: one group of the configuration for each kind."""
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

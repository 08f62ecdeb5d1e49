"""`write_mlx`: MLX's affine mode, which is our form: `scales · q + biases` in groups along a row.

`<layer>.weight` holds the codes, a little-endian bit stream a row in words of 32 bits; `scales`
and `biases` lie beside it; `config.json` says bits and group size, for each layer that differs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import (
    EXACT,
    NO_ORDER,
    Capability,
    StoredTensor,
    partly,
    rounds,
)
from qalora_compile.exporters.checkpoints.hf_folder import (
    DTYPES,
    FolderWriter,
    add_floats,
    add_layers,
    check_parameters,
    most_common,
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

GROUPS = (128, 64, 32)
"""Group sizes that MLX has kernels for, largest first."""


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """What the format does to each property of a program."""
    exact = EXACT if spec.parameter_dtype == "float32" else rounds(spec.parameter_dtype)
    return {
        "codes of 4, 3 and 2 bits": EXACT,
        "codes of 8 bits": EXACT,
        "scale": exact,
        "real zero-point": exact,
        "groups": partly("32, 64, 128; multiples are cut", exact),
        "tail groups": partly("tails of a multiple of 32", exact),
        "activation order": NO_ORDER,
        "matrices of floats": exact,
        "vectors": exact,
        "tied weights": EXACT,
        "other architectures": Capability("exact", "as far as mlx-lm knows them"),
    }


def write_mlx(checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write a folder that mlx-lm loads.

    Raises:
        UnsupportedError: a weight is stored `[K, N]` in the model, or was quantized in activation
            order, or no layer has groups that fit.
        UserInputError: float16 was asked for and cannot hold a value.
    """
    dtype, layers = DTYPES[spec.parameter_dtype], checkpoint.layers
    refuse_transposed(layers, "mlx-lm")
    refuse_if_none_fits(layers, _misfit)
    refuse_sorted(layers, _misfit, "MLX")
    check_parameters(layers, dtype, _misfit)
    writer = FolderWriter(folder, tag="mlx")
    add = partial(_add_layer, writer, dtype)
    rows = [*add_layers(writer, layers, dtype, _misfit, add)]
    rows += add_floats(writer, checkpoint, dtype)
    changes = {"quantization": quantization(layers), "dtype": spec.parameter_dtype}
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows


def _group_size(layer: Layer) -> int:
    """The largest of MLX's sizes that the groups can be cut into; 0 if there is none."""
    return next((size for size in GROUPS if layer.unit % size == 0), 0)


def _misfit(layer: Layer) -> str:
    if _group_size(layer):
        return ""
    return f"groups of {layer.group_size} in rows of {layer.site.k} are none of MLX's"


def _add_layer(writer: FolderWriter, dtype: torch.dtype, layer: Layer) -> StoredTensor:
    group_size = _group_size(layer)
    affine = layer.cut(group_size)
    words = pack_words(affine.codes, layer.bits).view(torch.uint32)
    scale, offset = affine.scale.to(dtype), affine.offset.to(dtype)
    writer.add(f"{layer.name}{WEIGHT}", words)
    writer.add(f"{layer.name}.scales", scale)
    writer.add(f"{layer.name}.biases", offset)
    form = f"affine {layer.bits} bits, groups of {group_size}"
    return stored_affine(layer.name, form, affine, scale, offset)


def quantization(layers: tuple[Layer, ...]) -> dict[str, object]:
    """What `config.json` says: bits and group size, and the layers that have others."""
    shapes = {layer.name: (layer.bits, _group_size(layer)) for layer in layers}
    bits, group_size = most_common(shape for shape in shapes.values() if shape[1])
    value: dict[str, object] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for name, shape in shapes.items():
        if not shape[1]:
            value[name] = False
        elif shape != (bits, group_size):
            value[name] = {"group_size": shape[1], "bits": shape[0], "mode": "affine"}
    return value

"""`write_mlx`: MLX's affine mode, which is our form: `scales · q + biases` in groups along a row.

`<layer>.weight` holds the codes, a little-endian bit stream a row in words of 32 bits; `scales`
and `biases` lie beside it; `config.json` says bits and group size, for each layer that differs.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.base import EXACT, Capability, StoredTensor, rounds
from qalora_compile.exporters.checkpoint import (
    WEIGHT,
    Checkpoint,
    Layer,
    check_half_range,
    stored_affine,
)
from qalora_compile.exporters.hf_folder import (
    DTYPES,
    FolderWriter,
    add_float,
    add_floats,
    common_shape,
)
from qalora_compile.progress import track

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
        "groups": Capability("exact", "of 32, 64, 128; multiples are cut, others as floats"),
        "tail groups": Capability("exact", "of a multiple of 32; others as floats"),
        "matrices of floats": exact,
        "vectors": exact,
        "tied weights": EXACT,
        "other architectures": Capability("exact", "as far as mlx-lm knows them"),
    }


def write_mlx(checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write a folder that mlx-lm loads.

    Raises:
        UnsupportedError: a weight is stored `[K, N]` in the model, or no layer has groups that fit.
        UserInputError: float16 was asked for and cannot hold a value.
    """
    dtype = DTYPES[spec.parameter_dtype]
    sizes = _group_sizes(checkpoint.layers)
    for layer in checkpoint.layers:
        if dtype == torch.float16 and layer.name in sizes:
            for what, values in zip(("scale", "offset"), layer.parameters(), strict=True):
                check_half_range(layer.name, what, values)
    writer, rows = FolderWriter(folder, tag="mlx"), []
    for layer in track(checkpoint.layers, "write weights"):
        if layer.name in sizes:
            rows.append(_add_layer(writer, layer, sizes[layer.name], dtype))
        else:
            remark = f"groups of {layer.group_size} in rows of {layer.site.k} are none of MLX's"
            name, values = f"{layer.name}{WEIGHT}", layer.affine().dequantize()
            rows.append(add_float(writer, name, layer.name, values, dtype, remark))
    rows += add_floats(writer, checkpoint, dtype)
    changes = {
        "quantization": quantization(checkpoint.layers, sizes),
        "dtype": spec.parameter_dtype,
    }
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows


def _group_sizes(layers: tuple[Layer, ...]) -> dict[str, int]:
    """The group size of each layer that MLX can hold on codes.

    Raises:
        UnsupportedError: a weight is stored `[K, N]`, or no layer fits.
    """
    for layer in layers:
        if layer.site.transposed:
            raise UnsupportedError(
                "the model stores this weight as [K, N], and MLX's models turn it on loading",
                where=layer.name,
                hint="target float writes it as the model has it",
            )
    fitting = {layer.name: [g for g in GROUPS if layer.unit % g == 0] for layer in layers}
    sizes = {name: groups[0] for name, groups in fitting.items() if groups}
    if layers and not sizes:
        raise UnsupportedError(
            f"no layer has groups of {', '.join(map(str, GROUPS))} or of a multiple of them",
            where=layers[0].name,
            hint="quantize with --group-size 32, 64 or 128",
        )
    return sizes


def _add_layer(
    writer: FolderWriter, layer: Layer, group_size: int, dtype: torch.dtype
) -> StoredTensor:
    affine = layer.cut(group_size)
    row_bytes = layer.site.k * layer.bits // 8
    words = affine.pack()[:, :row_bytes].contiguous().view(torch.uint32)
    scale, offset = affine.scale.to(dtype), affine.offset.to(dtype)
    writer.add(f"{layer.name}{WEIGHT}", words)
    writer.add(f"{layer.name}.scales", scale)
    writer.add(f"{layer.name}.biases", offset)
    form = f"affine {layer.bits} bits, groups of {group_size}"
    return stored_affine(layer.name, form, affine, scale, offset)


def quantization(layers: tuple[Layer, ...], sizes: dict[str, int]) -> dict[str, object]:
    """What `config.json` says: bits and group size, and the layers that have others."""
    bits, group_size = common_shape(layers, sizes)
    value: dict[str, object] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for layer in layers:
        size = sizes.get(layer.name)
        if size is None:
            value[layer.name] = False
        elif (layer.bits, size) != (bits, group_size):
            value[layer.name] = {"group_size": size, "bits": layer.bits, "mode": "affine"}
    return value

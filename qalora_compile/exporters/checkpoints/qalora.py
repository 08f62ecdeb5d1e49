"""`write_own`: unchanged codes, scales and offsets, as docs/reference/formats.md specifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import EXACT, PROPERTIES, Capability, StoredTensor
from qalora_compile.exporters.checkpoints.hf_folder import FolderWriter
from qalora_compile.exporters.checkpoints.named_tensors import Checkpoint, Layer
from qalora_compile.files import write_json
from qalora_compile.ir.activation_order import ORDER
from qalora_compile.ir.lazy_tensor import materialize
from qalora_compile.ir.stages import CODE_NAMES
from qalora_compile.progress import track

LAYERS_FILE = "layers.json"
FORMAT = "qalora-weights"
VERSION, ORDERED_VERSION = 1, 2
"""Version of a folder without activation order, and with it: a reader of version 1 refuses that."""


def capabilities(_: ExportSpec) -> dict[str, Capability]:
    """How exactly the format keeps each property of a program: all are exact."""
    return dict.fromkeys(PROPERTIES, EXACT)


def write_own(checkpoint: Checkpoint, folder: Path, _: ExportSpec) -> list[StoredTensor]:
    """Write the tensors of a program under the model's names, without its graph."""
    writer, rows, layers = FolderWriter(folder), [], {}
    for layer in track(checkpoint.layers, "write weights"):
        for name, tensor in zip(CODE_NAMES, layer.tensors, strict=True):
            writer.add(f"{layer.name}.{name}", materialize(tensor))
        if layer.order is not None:
            writer.add(f"{layer.name}.{ORDER}", layer.order.to(torch.int32))
        layers[layer.name] = _row(layer)
        form = f"{layer.bits} bits, groups of {layer.group_size}"
        rows.append(StoredTensor(layer.name, layer.name, form))
    for name, values in checkpoint.float_values():
        writer.add(name, values)
        rows.append(StoredTensor(name, name, str(values.dtype).removeprefix("torch.")))
    ordered = any(layer.order is not None for layer in checkpoint.layers)
    version = ORDERED_VERSION if ordered else VERSION
    write_json(folder / LAYERS_FILE, {"format": FORMAT, "version": version, "layers": layers})
    # Readers that do not know the format must refuse it, not fill in random weights.
    changes: dict[str, Any] = {}
    if checkpoint.description is not None:
        changes["quantization_config"] = {"quant_method": FORMAT, "layers": LAYERS_FILE}
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows


def _row(layer: Layer) -> dict[str, Any]:
    """The row of a layer in `layers.json`; it names an order only if there is one."""
    site = layer.site
    row = {
        "bits": layer.bits,
        "group_size": layer.group_size,
        "n": site.n,
        "k": site.k,
        "transposed": site.transposed,
        "whole_zero_points": site.frozen_integer_zero,
    }
    return row if layer.order is None else row | {"ordered": True}

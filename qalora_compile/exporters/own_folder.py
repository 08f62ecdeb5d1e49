"""`write_own`: codes, scales and offsets as they are; docs/formats.md is the specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.base import EXACT, NO_ORDER, Capability, StoredTensor
from qalora_compile.exporters.checkpoint import Checkpoint, refuse_sorted
from qalora_compile.exporters.hf_folder import FolderWriter
from qalora_compile.files import write_json
from qalora_compile.ir.deferred import materialize
from qalora_compile.ir.program import CODE_NAMES
from qalora_compile.progress import track

LAYERS_FILE = "layers.json"
FORMAT, VERSION = "qalora-weights", 1
_PROPERTIES = (
    *("codes of 4, 3 and 2 bits", "codes of 8 bits", "scale", "real zero-point", "groups"),
    *("tail groups", "matrices of floats", "vectors", "tied weights", "other architectures"),
)


def capabilities(_: ExportSpec) -> dict[str, Capability]:
    """What the format does to each property of a program: nothing, where it takes it."""
    return dict.fromkeys(_PROPERTIES, EXACT) | {"activation order": NO_ORDER}


def write_own(checkpoint: Checkpoint, folder: Path, _: ExportSpec) -> list[StoredTensor]:
    """Write the tensors of a program under the model's names, without its graph.

    Raises:
        UnsupportedError: a weight was quantized in activation order.
    """
    refuse_sorted(checkpoint.layers, lambda _: "", "layers.json")
    writer, rows, layers = FolderWriter(folder), [], {}
    for layer in track(checkpoint.layers, "write weights"):
        for name, tensor in zip(CODE_NAMES, layer.tensors, strict=True):
            writer.add(f"{layer.name}.{name}", materialize(tensor))
        site = layer.site
        layers[layer.name] = {
            "bits": layer.bits,
            "group_size": layer.group_size,
            "n": site.n,
            "k": site.k,
            "transposed": site.transposed,
            "whole_zero_points": site.whole,
        }
        form = f"{layer.bits} bits, groups of {layer.group_size}"
        rows.append(StoredTensor(layer.name, layer.name, form))
    for name, values in checkpoint.float_values("write floats"):
        writer.add(name, values)
        rows.append(StoredTensor(name, name, str(values.dtype).removeprefix("torch.")))
    write_json(folder / LAYERS_FILE, {"format": FORMAT, "version": VERSION, "layers": layers})
    # Readers that do not know the format have to refuse it, not to fill in weights at random.
    changes: dict[str, Any] = {}
    if checkpoint.description is not None:
        changes["quantization_config"] = {"quant_method": FORMAT, "layers": LAYERS_FILE}
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows

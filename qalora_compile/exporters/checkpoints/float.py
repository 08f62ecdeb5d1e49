"""`write_float`: plain floats in the layout of Hugging Face, for anything that reads that."""

from __future__ import annotations

from pathlib import Path

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import EXACT, Capability, StoredTensor, rounds
from qalora_compile.exporters.checkpoints.hf_folder import (
    DTYPES,
    FolderWriter,
    add_float,
    add_floats,
)
from qalora_compile.exporters.checkpoints.named_tensors import WEIGHT, Checkpoint
from qalora_compile.progress import track


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """What the format does to each property of a program."""
    exact = spec.parameter_dtype == "float32"
    weights = Capability("exact", "as floats") if exact else rounds(spec.parameter_dtype)
    return {
        "codes of 4, 3 and 2 bits": weights,
        "codes of 8 bits": weights,
        "scale": weights,
        "real zero-point": weights,
        "groups": weights,
        "tail groups": weights,
        "activation order": weights,
        "matrices of floats": EXACT if exact else rounds(spec.parameter_dtype),
        "vectors": EXACT if exact else rounds(spec.parameter_dtype),
        "tied weights": EXACT,
        "other architectures": EXACT,
    }


def write_float(checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write `W = scale · q + offset` of every layer, under the model's own names.

    Raises:
        UserInputError: float16 was asked for and cannot hold a value.
    """
    dtype, writer = DTYPES[spec.parameter_dtype], FolderWriter(folder)
    rows = []
    for layer in track(checkpoint.layers, "write weights"):
        weight = layer.weight()
        values = weight.t() if layer.site.transposed else weight
        rows.append(add_float(writer, f"{layer.name}{WEIGHT}", layer.name, values, dtype))
    rows += add_floats(writer, checkpoint, dtype)
    changes = {} if checkpoint.description is None else {"dtype": spec.parameter_dtype}
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows

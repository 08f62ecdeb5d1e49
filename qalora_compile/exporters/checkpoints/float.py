"""`write_float`: plain floats in the folder layout of Hugging Face."""

from __future__ import annotations

from pathlib import Path

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import EXACT, PROPERTIES, Capability, StoredTensor
from qalora_compile.exporters.checkpoints.hf_folder import (
    DTYPES,
    FolderWriter,
    add_floats,
    add_layer_as_floats,
)
from qalora_compile.exporters.checkpoints.named_tensors import Checkpoint
from qalora_compile.exporters.checkpoints.packed_folder import exactness
from qalora_compile.progress import track


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the format keeps each property of a program."""
    floats = exactness(spec)
    weights = Capability("exact", "as floats") if floats is EXACT else floats
    exact = dict.fromkeys(("tied weights", "other architectures"), EXACT)
    shared = dict.fromkeys(("matrices of floats", "vectors"), floats)
    return dict.fromkeys(PROPERTIES, weights) | shared | exact


def write_float(checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write `W = scale · q + offset` of every layer, under the model's own names.

    Raises:
        UserInputError: float16 was asked for and cannot hold a value.
    """
    dtype, writer = DTYPES[spec.parameter_dtype], FolderWriter(folder)
    layers = track(checkpoint.layers, "write weights")
    rows = [add_layer_as_floats(writer, layer, dtype) for layer in layers]
    rows += add_floats(writer, checkpoint, dtype)
    changes = {} if checkpoint.description is None else {"dtype": spec.parameter_dtype}
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows

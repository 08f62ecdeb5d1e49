"""`write_gptq`: GPTQ checkpoints, version 2, for programs whose zero-points are whole numbers.

`qweight` packs codes along K, `qzeros` zero-points along N, both as little-endian bit streams in
words of 32 bits; `scales` is `[L, N]`, `g_idx` names the group of each input. Version 2 stores the
zero-points themselves, version 1 those less one.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qalora_compile._version import __version__
from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import (
    EXACT,
    Capability,
    StoredTensor,
    partly,
    rounds,
    unsupported,
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
    Checkpoint,
    Layer,
    refuse_if_none_fits,
    stored_affine,
)
from qalora_compile.files import write_json
from qalora_compile.ir.activation_order import unsorted
from qalora_compile.ir.packing.bitstream import pack_words
from qalora_compile.ir.site_plan import EMBEDDING

QUANTIZE_FILE = "quantize_config.json"
GROUPS = (1024, 512, 256, 128, 64, 32, 16)
"""Group sizes that GPTQModel takes, largest first."""
_UNIT = 32


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """What the format does to each property of a program."""
    exact = EXACT if spec.parameter_dtype == "float32" else rounds(spec.parameter_dtype)
    return {
        "codes of 4, 3 and 2 bits": EXACT,
        "codes of 8 bits": EXACT,
        "scale": exact,
        "real zero-point": unsupported("whole numbers only; others are refused"),
        "groups": partly("16 to 1024; multiples are cut", exact),
        "tail groups": partly("tails cut, where K and N are multiples of 32", exact),
        "activation order": Capability("exact", "g_idx"),
        "matrices of floats": exact,
        "vectors": exact,
        "tied weights": EXACT,
        "other architectures": Capability("exact", "as far as the reader knows them"),
    }


def write_gptq(checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write a folder in GPTQ's layout.

    Raises:
        UnsupportedError: a zero-point is no whole number, or no layer has groups that fit.
        UserInputError: float16 was asked for and cannot hold a value.
    """
    dtype, layers = DTYPES[spec.parameter_dtype], checkpoint.layers
    refuse_if_none_fits(layers, _misfit)
    check_parameters(layers, dtype, _misfit)
    for layer in layers:
        if not _misfit(layer):
            layer.zero_points()
    writer = FolderWriter(folder)
    rows = [*add_layers(writer, layers, dtype, _misfit, partial(_add_layer, writer, dtype))]
    rows += add_floats(writer, checkpoint, dtype)
    config = quantize_config(layers)
    write_json(folder / QUANTIZE_FILE, config)
    changes = {"dtype": spec.parameter_dtype, "quantization_config": config}
    writer.finish(checkpoint.description, changes | checkpoint.untied())
    return rows


def _group_size(layer: Layer) -> int:
    return next((size for size in GROUPS if layer.unit % size == 0), 0)


def _misfit(layer: Layer) -> str:
    if layer.site.kind == EMBEDDING:
        return "a table: GPTQ has linear layers on codes"
    if layer.site.k % _UNIT or layer.site.n % _UNIT:
        return f"{layer.site.shape} is no multiple of {_UNIT}"
    return "" if _group_size(layer) else f"groups of {layer.group_size} are none of GPTQ's"


def _add_layer(writer: FolderWriter, dtype: torch.dtype, layer: Layer) -> StoredTensor:
    size = _group_size(layer)
    affine, zeros = layer.cut(size), layer.cut_zero_points(size)
    scale = affine.scale.to(dtype)
    groups = torch.arange(layer.site.k, dtype=torch.int32) // size
    tensors = {
        "qweight": pack_words(unsorted(affine.codes, layer.order), layer.bits).t(),
        "qzeros": pack_words(zeros.t(), layer.bits),
        "scales": scale.t(),
        "g_idx": unsorted(groups, layer.order),
    }
    for name, tensor in tensors.items():
        writer.add(f"{layer.name}.{name}", tensor)
    form = f"gptq_v2 {layer.bits} bits, groups of {size}"
    return stored_affine(layer.name, form, affine, scale, -scale.double() * zeros.double())


def quantize_config(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """What the folder says of its layers; `dynamic` names those that differ (`+`) or are floats."""
    shapes = {layer.name: (layer.bits, _group_size(layer)) for layer in layers}
    odd = {layer.name for layer in layers if _misfit(layer)}
    bits, group_size = most_common(s for name, s in shapes.items() if name not in odd)
    dynamic: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        if name in odd:
            dynamic[f"-:^{re.escape(name)}$"] = {}
        elif shape != (bits, group_size):
            dynamic[f"+:^{re.escape(name)}$"] = {"bits": shape[0], "group_size": shape[1]}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(layer.order is not None for layer in layers if layer.name not in odd),
        "sym": False,
        "lm_head": "lm_head" in shapes and "lm_head" not in odd,
        "pack_dtype": "int32",
        "dynamic": dynamic or None,
        "meta": {"quantizer": [f"qalora-compile:{__version__}"]},
    }

"""`write_gptq`: GPTQ checkpoints, version 2, for programs with integer zero-points.

`qweight` packs codes along K, `qzeros` zero-points along N, both as little-endian bit streams in
words of 32 bits; `scales` is `[L, N]`, `g_idx` names the group of each input. Version 2 stores the
zero-points themselves, version 1 stores them minus one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile._version import __version__
from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import Capability, StoredTensor, partly, unsupported
from qalora_compile.exporters.checkpoints.named_tensors import Checkpoint, Layer, stored_affine
from qalora_compile.exporters.checkpoints.packed_folder import (
    PackedFormat,
    exactness,
    first_divisor,
    most_common,
    packed_capabilities,
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
    """How exactly the format keeps each property of a program."""
    exact = exactness(spec)
    own = {
        "real zero-point": unsupported("integers only; others are refused"),
        "groups": partly("16 to 1024; multiples are cut", exact),
        "tail groups": partly("tails cut, where K and N are multiples of 32", exact),
        "activation order": Capability("exact", "g_idx"),
        "other architectures": Capability("exact", "as far as the reader knows them"),
    }
    return packed_capabilities(spec, own)


def write_gptq(checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write a folder in GPTQ's layout.

    Raises:
        UnsupportedError, UserInputError: see `PackedFormat.write`.
    """
    rows = _FORMAT.write(checkpoint, folder, spec)
    write_json(folder / QUANTIZE_FILE, quantize_config(checkpoint.layers))
    return rows


def _misfit(layer: Layer) -> str:
    if layer.site.kind == EMBEDDING:
        return "an embedding table: GPTQ has codes for linear layers only"
    if layer.site.k % _UNIT or layer.site.n % _UNIT:
        return f"{layer.site.shape} is not a multiple of {_UNIT}"
    fits = first_divisor(layer, GROUPS)
    return "" if fits else f"GPTQ has no groups of {layer.group_size}"


def _pack(layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Tensor], StoredTensor]:
    size = first_divisor(layer, GROUPS)
    affine, zeros = layer.cut(size), layer.cut_zero_points(size)
    scale = affine.scale.to(dtype)
    groups = torch.arange(layer.site.k, dtype=torch.int32) // size
    tensors = {
        ".qweight": pack_words(unsorted(affine.codes, layer.order), layer.bits).t(),
        ".qzeros": pack_words(zeros.t(), layer.bits),
        ".scales": scale.t(),
        ".g_idx": unsorted(groups, layer.order),
    }
    form = f"gptq_v2 {layer.bits} bits, groups of {size}"
    offset = -scale.double() * zeros.double()
    return tensors, stored_affine(layer.name, form, affine, scale, offset)


def quantize_config(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The quantization settings; `dynamic` names layers that differ (`+`) or are floats (`-`)."""
    shapes = {layer.name: (layer.bits, first_divisor(layer, GROUPS)) for layer in layers}
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


_FORMAT = PackedFormat(
    reader="GPTQModel",
    misfit=_misfit,
    pack=_pack,
    config=lambda layers: {"quantization_config": quantize_config(layers)},
    has_transposed=True,
    has_order=True,
    has_real_zeros=False,
)

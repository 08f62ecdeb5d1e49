"""Folders of codes that this package writes (`export --target safetensors`, docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qalora_compile.capture.stored.base import (
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    section,
    take,
    whole_number,
)
from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import UserInputError
from qalora_compile.files import read_json
from qalora_compile.ir.packing import packed_width, unpack_codes
from qalora_compile.ir.program import CODE_NAMES
from qalora_compile.ir.stored_codes import StoredWeight

METHOD = "qalora-weights"
_LAYERS, _VERSION = "layers.json", 1


def decode_own(tensors: Tensors, config: Mapping[str, Any], *, folder: Path) -> Decoded:
    """Every layer that `layers.json` names.

    Raises:
        UserInputError: the file is of another version, or a tensor is missing or of another shape
            than it says.
    """
    said = read_json(folder / _LAYERS)
    said = said if isinstance(said, Mapping) else {}
    if said.get("format") != METHOD or said.get("version") != _VERSION:
        raise UserInputError(
            f"{_LAYERS} is of format {said.get('format')!r}, version {said.get('version')!r}",
            where=_LAYERS,
            hint=f"this version reads {METHOD!r}, version {_VERSION}",
        )
    weights, used, turned = {}, set[str](), set[str]()
    layers = section(said, "layers", _LAYERS)
    for module in layers:
        layer, where = section(layers, module, _LAYERS), f"{_LAYERS}: {module}"
        bits, k, group = (whole_number(layer, name, where) for name in ("bits", "k", "group_size"))
        if bits not in SUPPORTED_BITS:
            raise UserInputError(f"bits is {bits}", where=where, hint=f"one of {SUPPORTED_BITS}")
        packed, scale, offset = (take(tensors, module, CODE_NAMES)[part] for part in CODE_NAMES)
        check_matrix(module, "qweight", packed, torch.uint8, "[N, bytes of a row]")
        if packed.shape[1] != packed_width(k, bits):
            raise UserInputError(
                f"{module}.qweight is {list(packed.shape)}, and {k} codes of {bits} bits take "
                f"{packed_width(k, bits)} bytes a row",
                where=f"{module}.qweight",
            )
        codes = unpack_codes(packed, bits, k)
        affine = affine_of(module, codes, scale, offset, bits, group)
        weights[module] = StoredWeight(affine, f"{bits} bits")
        used |= {f"{module}.{part}" for part in CODE_NAMES}
        turned |= {module} if layer.get("transposed") else set()
    return Decoded(weights, frozenset(used), turned=frozenset(turned))

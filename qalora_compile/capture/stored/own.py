"""Folders of codes that this package writes (`export --target safetensors`, docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_compile.capture.stored.base import Decoded, Tensors, affine_of, take
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
    if said.get("format") != METHOD or said.get("version") != _VERSION:
        raise UserInputError(
            f"{_LAYERS} is of format {said.get('format')!r}, version {said.get('version')!r}",
            where=_LAYERS,
            hint=f"this version reads {METHOD!r}, version {_VERSION}",
        )
    weights, used, turned = {}, set[str](), set[str]()
    for module, layer in said["layers"].items():
        bits, k = int(layer["bits"]), int(layer["k"])
        packed, scale, offset = (take(tensors, module, CODE_NAMES)[part] for part in CODE_NAMES)
        if packed.dim() != 2 or packed.shape[1] != packed_width(k, bits):
            raise UserInputError(
                f"{module}.qweight is {list(packed.shape)}, and {k} codes of {bits} bits take "
                f"{packed_width(k, bits)} bytes a row",
                where=f"{module}.qweight",
            )
        codes = unpack_codes(packed, bits, k)
        affine = affine_of(module, codes, scale, offset, bits, int(layer["group_size"]))
        weights[module] = StoredWeight(affine, f"{bits} bits")
        used |= {f"{module}.{part}" for part in CODE_NAMES}
        turned |= {module} if layer.get("transposed") else set()
    return Decoded(weights, frozenset(used), turned=frozenset(turned))

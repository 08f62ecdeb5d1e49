"""Folders of codes of this package (`export --target safetensors`, docs/reference/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.checkpoints.base import (
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    read_count,
    section,
    take,
)
from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import UserInputError
from qalora_compile.ir.activation_order import ORDER
from qalora_compile.ir.checkpoint_codes import CheckpointWeight
from qalora_compile.ir.packing.bitstream import packed_width, unpack_codes
from qalora_compile.ir.stages import CODE_NAMES
from qalora_compile.untrusted import read_json

METHOD = "qalora-weights"
_LAYERS = "layers.json"
_VERSIONS = (1, 2)
_ORDERED = "ordered"
"""The key for a layer's order, from version 2 on."""


def decode_own(tensors: Tensors, config: Mapping[str, Any], *, folder: Path) -> Decoded:
    """Every layer that `layers.json` names.

    Raises:
        UserInputError: the file has another version, a tensor is missing or does not fit it, or an
            order is not a permutation of the columns.
    """
    said = read_json(folder / _LAYERS)
    said = said if isinstance(said, Mapping) else {}
    if said.get("format") != METHOD or said.get("version") not in _VERSIONS:
        raise UserInputError(
            f"{_LAYERS} has format {said.get('format')!r}, version {said.get('version')!r}",
            where=_LAYERS,
            hint=f"this package reads {METHOD!r}, versions {_VERSIONS[0]} to {_VERSIONS[-1]}",
        )
    weights, used, transposed = {}, set[str](), set[str]()
    layers = section(said, "layers", _LAYERS)
    for module in layers:
        layer, where = section(layers, module, _LAYERS), f"{_LAYERS}: {module}"
        ordered = _is_ordered(layer, where, said["version"])
        bits, k, group = (read_count(layer, name, where) for name in ("bits", "k", "group_size"))
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
        order = _order(tensors, module, k) if ordered else None
        form = f"{bits} bits{', act-order' if ordered else ''}"
        weights[module] = CheckpointWeight(affine, form, order)
        used |= {f"{module}.{part}" for part in (*CODE_NAMES, *([ORDER] if ordered else []))}
        transposed |= {module} if layer.get("transposed") else set()
    return Decoded(weights, frozenset(used), transposed=frozenset(transposed))


def _is_ordered(layer: Mapping[str, Any], where: str, version: int) -> bool:
    """Whether a layer's columns are stored in a permuted order.

    Raises:
        UserInputError: the entry is not a boolean, or readers of the folder's version would ignore
            the order.
    """
    ordered = layer.get(_ORDERED, False)
    if not isinstance(ordered, bool):
        raise UserInputError(f"{_ORDERED} is {ordered!r}", where=where, hint="true or false")
    if ordered and version < _VERSIONS[-1]:
        raise UserInputError(
            f"the layer has an order of columns, but the folder has version {version}",
            where=where,
            hint=f"folders with an order have version {_VERSIONS[-1]}",
        )
    return ordered


def _order(tensors: Tensors, module: str, k: int) -> Tensor:
    """The order of a layer's columns, `[K]` int64: code i belongs to column `order[i]`.

    Raises:
        UserInputError: it is missing, has another dtype or length, or is not a permutation.
    """
    name, order = f"{module}.{ORDER}", take(tensors, module, (ORDER,))[ORDER]
    if order.dtype != torch.int32 or list(order.shape) != [k]:
        raise UserInputError(
            f"{name} is {order.dtype} {list(order.shape)}, but {k} columns need int32 [{k}]",
            where=name,
        )
    if not torch.equal(order.sort().values, torch.arange(k, dtype=torch.int32)):
        raise UserInputError(
            f"{name} does not name each column from 0 to {k - 1} once",
            where=name,
            hint="code i of a row belongs to column order[i] of the weight",
        )
    return order.long()

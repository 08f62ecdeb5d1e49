"""The weights of a translated model, materialized one after another when they are written."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora_compile.errors import InternalError, UserInputError
from qalora_compile.exporters.onnx.one_file import fits_in_one_file
from qalora_compile.exporters.onnx.weight_file import WeightFile
from qalora_compile.ir.lazy_tensor import is_lazy, materialize, materialize_parts
from qalora_compile.ir.program import Program
from qalora_compile.optional import require
from qalora_compile.progress import announce
from qalora_compile.untrusted.artifacts import data_file

INLINE_LIMIT_BYTES = 1 << 30
"""Weights beyond this are written one after another to `<name>_data` first."""

LAZY_INLINE_LIMIT_BYTES = 32 << 20
"""The same limit for lazy weights: inside the model's file, all would be in memory at once."""

_SMALL = 256
"""Tensors of at most this many bytes stay inside the model's file."""

_ROOM_BYTES = 64 << 20
"""Bytes reserved for the graph itself and the file system, in addition to the weights."""


def defer_initializers(model: Any, program: Program) -> None:
    """Make the initializers of lazy tensors read their values when they are written."""
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    tensors = program.tensors()
    for name, value in model.graph.initializers.items():
        stored = getattr(value.const_value, "raw", None)
        if not isinstance(stored, Tensor) or not is_lazy(stored):
            continue
        if name not in tensors:
            raise InternalError(f"the initializer {name} is not a tensor of the program")
        make = partial(_Parts, tensors[name])
        shape, dtype = value.const_value.shape, value.const_value.dtype
        value.const_value = ir.LazyTensor(make, dtype, shape, name=name)


def write_model(model: Any, path: Path, *, external_data: bool) -> int:
    """Write a model, with large weights in `data_file(path)`.

    Args:
        model: An `onnx_ir.Model`.
        path: The `.onnx` file.
        external_data: Whether the weights stay in a second file.

    Returns:
        How many weights an interrupted run had already written there.

    Raises:
        UserInputError: there is not enough room on the disk.
    """
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    values = list(model.graph.initializers.values())
    total = sum(value.const_value.nbytes for value in values)
    deferred = any(isinstance(v.const_value, ir.LazyTensor) for v in values)
    data = data_file(path)
    there = data.stat().st_size if data.is_file() else 0
    free = shutil.disk_usage(path.parent).free
    limit = LAZY_INLINE_LIMIT_BYTES if deferred else INLINE_LIMIT_BYTES
    apart = external_data or total > limit
    # Joined, the weights are there twice for a moment.
    needed = total * (2 if apart and not external_data and fits_in_one_file(total) else 1)
    if needed + _ROOM_BYTES > free + there:
        raise UserInputError(
            f"the model takes {(needed - there) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(path.parent),
            hint="make room, or write to another disk",
        )
    kept = 0
    if apart:
        kept = _write_weights(ir, [v for v in values if v.const_value.nbytes > _SMALL], data)
    ir.save(model, path)
    return kept


def _write_weights(ir: Any, values: list[Any], path: Path) -> int:
    """Move the values of initializers into a file; returns how many were already there."""
    kept = 0
    with WeightFile(path) as file:
        for done, value in enumerate(values):
            tensor = value.const_value
            announce("write", done, len(values))
            key = (value.name, tensor.dtype.name, [int(size) for size in tensor.shape])
            found = file.find(*key)
            kept += found is not None
            entry = found or file.add(*key, tensor)
            value.const_value = ir.ExternalTensor(
                path.name,
                entry.offset,
                entry.length,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=path.parent,
            )
    announce("write", len(values), len(values))
    return kept


class _Parts:
    """The interface that `onnx_ir.LazyTensor` needs; the data are written in parts.

    Args:
        tensor: A lazy tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tofile(self, file: Any) -> None:
        """Write the raw data to an open file."""
        for part in materialize_parts(self._tensor):
            _adapt(part).tofile(file)

    def tobytes(self) -> bytes:
        """The raw data."""
        return b"".join(_adapt(part).tobytes() for part in materialize_parts(self._tensor))

    def numpy(self) -> Any:
        """The values."""
        return _adapt(materialize(self._tensor)).numpy()


def _adapt(tensor: Tensor) -> Any:
    adapters = require("onnx_ir.tensor_adapters", extra="onnx", purpose="write an ONNX model")
    return adapters.TorchTensor(tensor.detach())

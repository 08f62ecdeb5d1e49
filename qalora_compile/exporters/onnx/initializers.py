"""The weights of a translated model: made when they are written, one after another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora_compile.errors import InternalError, UserInputError
from qalora_compile.ir.deferred import is_deferred, materialize, materialize_parts
from qalora_compile.ir.program import Program
from qalora_compile.optional import require
from qalora_compile.progress import announce

INLINE_LIMIT_BYTES = 1 << 30
"""Weights beyond this go to `<name>.data`; a protobuf file cannot exceed 2 GiB."""

DEFERRED_INLINE_LIMIT_BYTES = 32 << 20
"""The same where weights are deferred: inside the model's file they would all be in memory."""

_ROOM_BYTES = 64 << 20
"""What the graph itself and a file system may take beside the weights."""


def defer_initializers(model: Any, program: Program) -> None:
    """Let the initializers of deferred tensors take their values when they are written."""
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    tensors = program.tensors()
    for name, value in model.graph.initializers.items():
        stored = getattr(value.const_value, "raw", None)
        if not isinstance(stored, Tensor) or not is_deferred(stored):
            continue
        if name not in tensors:
            raise InternalError(f"the initializer {name} is no tensor of the program")
        make = partial(_Parts, tensors[name])
        shape, dtype = value.const_value.shape, value.const_value.dtype
        value.const_value = ir.LazyTensor(make, dtype, shape, name=name)


def write_model(model: Any, path: Path) -> None:
    """Write a model; large weights to `<name>.data` beside it.

    Raises:
        UserInputError: there is not enough room on the disk.
    """
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    initializers = model.graph.initializers.values()
    total = sum(value.const_value.nbytes for value in initializers)
    free = shutil.disk_usage(path.parent).free
    if total + _ROOM_BYTES > free:
        raise UserInputError(
            f"the model takes {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(path.parent),
            hint="make room, or write to another disk",
        )
    deferred = any(isinstance(v.const_value, ir.LazyTensor) for v in initializers)
    if total <= (DEFERRED_INLINE_LIMIT_BYTES if deferred else INLINE_LIMIT_BYTES):
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data", callback=_listener())


class _Parts:
    """What `onnx_ir.LazyTensor` asks of a tensor; written part by part, never whole in memory.

    Args:
        tensor: Deferred.
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


def _listener() -> Callable[[Any, Any], None]:
    return lambda tensor, info: announce("write", info.index + 1, info.total)

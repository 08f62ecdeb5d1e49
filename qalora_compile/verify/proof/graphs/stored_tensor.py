"""Stored tensors of safetensors, ONNX files or memory, as a proof reads them without torch.

The readers are the verifier's own. Values are numpy arrays; types that numpy lacks keep the bytes
of the file: bfloat16 as uint16, integers of less than a byte as a flat stream of uint8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted.element_types import HALVES, PACKED_TYPES, PROGRAM_TYPES
from qalora_compile.untrusted.safetensors_header import check_types

Array = np.ndarray[Any, np.dtype[Any]]

_SAFETENSORS = {kind.safetensors: kind.name for kind in PROGRAM_TYPES}
_ONNX = {kind.onnx: kind.name for kind in (*PROGRAM_TYPES, *PACKED_TYPES)}
_IN_BYTES = {"bfloat16": "uint16", "uint4": "uint8", "uint2": "uint8"}
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
"""u: the number that was rounded to the stored x is within u |x| of it."""
SMALLEST = {"float64": 2.0**-1075, "float32": 2.0**-150, "bfloat16": 2.0**-134, "float16": 2.0**-25}
"""Half the distance between subnormal numbers, which rounding may add."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file or in memory.

    Attributes:
        name: Its name in the file.
        dtype: `float32`, `bfloat16`, `uint4` …
        shape: Its shape, in elements.
        read: Returns its bytes as an array, see above.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array] = field(repr=False, compare=False)

    def values(self) -> Array:
        """The values, half precision widened to float32, which is exact."""
        raw = self.read()
        if self.dtype == "bfloat16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32) if self.dtype == "float16" else raw

    def wide(self) -> Array:
        """The values in float64."""
        return self.values().astype(np.float64)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of type, shape and values; half precision is widened first."""
        return digest_of(self.values())

    @property
    def widened(self) -> bool:
        """Whether the values are stored in half precision."""
        return self.dtype in HALVES


def digest_of(values: Array) -> str:
    """SHA-256 of an array's type, shape and values."""
    hashed = hashlib.sha256(f"{values.dtype.str}{values.shape}".encode())
    hashed.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def from_array(name: str, values: Array) -> StoredTensor:
    """A tensor in memory."""
    return StoredTensor(name, values.dtype.name, values.shape, lambda: values)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; their bytes stay in the file until they are read.

    Raises:
        UserInputError: the file is missing or malformed.
        UnsupportedError: a tensor has a type that programs do not have.
    """
    return {
        name: StoredTensor(
            name,
            _SAFETENSORS[row.dtype],
            row.shape,
            _from_file(path, row.begin, row.end - row.begin, _SAFETENSORS[row.dtype], row.shape),
        )
        for name, row in check_types(path, _SAFETENSORS).items()
    }


def _from_file(
    path: Path, offset: int, length: int, dtype: str, shape: tuple[int, ...]
) -> Callable[[], Array]:
    kind = np.dtype(_IN_BYTES.get(dtype, dtype))

    def read() -> Array:
        if length == 0:
            return np.zeros(shape, kind)
        try:
            raw = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(length,))
        except (OSError, ValueError) as error:
            raise UserInputError(f"{path.name} cannot be read: {error}", where=str(path)) from error
        values = raw.view(kind)
        return values if dtype in ("uint4", "uint2") else values.reshape(shape)

    return read


def from_onnx(proto: Any, folder: Path) -> StoredTensor:
    """An `onnx.TensorProto` with its values in the model or in an external data file.

    Raises:
        UserInputError: it has a type that exports of this package do not have.
    """
    if proto.data_type not in _ONNX:
        raise UserInputError(f"the tensor {proto.name} has ONNX type {proto.data_type}")
    dtype, shape = _ONNX[proto.data_type], tuple(proto.dims)
    if proto.data_location == 1:
        rows = {entry.key: entry.value for entry in proto.external_data}
        path, offset = folder / rows["location"], int(rows.get("offset", 0))
        length = int(rows.get("length", 0)) or path.stat().st_size - offset
        return StoredTensor(
            proto.name, dtype, shape, _from_file(path, offset, length, dtype, shape)
        )

    def read() -> Array:
        if not proto.HasField("raw_data"):
            helper = require("onnx", extra="onnx", purpose="read an ONNX model").numpy_helper
            values: Array = helper.to_array(proto)
            return values.view(np.uint16) if dtype == "bfloat16" else values
        raw = np.frombuffer(proto.raw_data, np.dtype(_IN_BYTES.get(dtype, dtype)))
        return raw if dtype in ("uint4", "uint2") else raw.reshape(shape)

    return StoredTensor(proto.name, dtype, shape, read)

"""`join_weights`: move a model's external data into the model's file, in pieces.

onnx and onnx_ir hold a complete model in memory to write it as one file. A protobuf message is a
sequence of fields, so the tensors are copied between the other fields here, and memory holds one
piece. Field numbers are those of onnx.proto, from the installed onnx.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from qalora_compile.errors import InternalError
from qalora_compile.files.copying import copy_range
from qalora_compile.optional import require
from qalora_compile.untrusted.artifacts import data_file

ONE_FILE_LIMIT_BYTES = 1_900_000_000
"""Weights up to this are written into the model's file; protobuf ends at 2 GiB."""

_LENGTH_DELIMITED = 2


def fits_in_one_file(size: int) -> bool:
    """Whether weights of `size` bytes are written into the model's file."""
    return size <= ONE_FILE_LIMIT_BYTES


def join_weights(path: Path) -> None:
    """Write a model and its external data as one file, and delete the data.

    Args:
        path: The `.onnx` file, with `data_file(path)` next to it.
    """
    onnx = require("onnx", extra="onnx", purpose="write an ONNX model")
    model = onnx.load(path, load_external_data=False)
    tensors = [_Tensor(proto) for proto in model.graph.initializer]
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString()
    size = len(graph) + sum(len(tensor.field) + tensor.length for tensor in tensors)
    field = _header(model, "graph", size)
    model.ClearField("graph")
    joined = path.with_name(f"{path.name}.joined")
    with joined.open("wb") as file, data_file(path).open("rb") as data:
        file.write(model.SerializeToString() + field + graph)
        for tensor in tensors:
            file.write(tensor.field)
            tensor.copy(data, file)
    os.replace(joined, path)
    data_file(path).unlink()


class _Tensor:
    """One initializer: the bytes before its data, and where the data are.

    Args:
        proto: A `TensorProto`; its external data are in the model's data file.
    """

    def __init__(self, proto: Any) -> None:
        stated = {entry.key: entry.value for entry in proto.external_data}
        self._offset = int(stated.get("offset", 0))
        self.length = int(stated["length"]) if stated else 0
        proto.ClearField("external_data")
        proto.ClearField("data_location")
        own = proto.SerializeToString()
        if stated:
            own += _header(proto, "raw_data", self.length)
        onnx = require("onnx", extra="onnx", purpose="write an ONNX model")
        self.field = _header(onnx.GraphProto, "initializer", len(own) + self.length) + own

    def copy(self, data: BinaryIO, file: BinaryIO) -> None:
        """Copy the data, if they are external."""
        if copy_range(data, file, self._offset, self.length) != self.length:
            raise InternalError("the weights that were written are shorter than the model says")


def _header(message: Any, name: str, size: int) -> bytes:
    """The bytes before a field of `size` bytes: its tag and its length."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(value: int) -> bytes:
    """An unsigned integer in groups of seven bits, the lowest first (protobuf's encoding)."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])

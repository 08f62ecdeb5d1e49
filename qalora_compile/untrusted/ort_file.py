"""Check the structure of a file in ONNX Runtime's own format (`.ort`) before it is loaded.

It is a FlatBuffers message. ONNX Runtime verifies its offsets when it loads the file; here, as for
ONNX files, sizes are compared with bytes and attributes of kernels with the shapes of their
weights. Python reads every offset within the bounds of the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted import check_regular, quoted
from qalora_compile.untrusted.artifacts import ORT_SUFFIX
from qalora_compile.untrusted.onnx_file import (
    MAX_BYTES,
    MAX_DEPTH,
    ORT_FORMAT,
    TEXT_TYPE,
    OnnxFile,
    check_onnx,
)
from qalora_compile.untrusted.onnx_tensors import BITS, TensorRow, check_node
from qalora_compile.untrusted.protobuf import MAX_AXES

_MAX_PARTS = 1 << 22
"""Limit of the nodes, names and attributes that are read: parts of a file may overlap."""
_INT64 = 7
_INT, _TENSOR, _GRAPH, _SPARSE = 2, 4, 5, 11
"""Kinds of attributes (`fbs.AttributeType`); the last ones are sparse tensors."""
_BROKEN = (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError)
"""What reading a malformed message raises."""


def check_model(path: Path) -> OnnxFile:
    """`check_ort` for a `.ort` file, otherwise `check_onnx`; ONNX Runtime decides by the name too.

    Raises:
        UserInputError: see there.
    """
    return check_ort(path) if path.suffix == ORT_SUFFIX else check_onnx(path)


def check_ort(path: Path) -> OnnxFile:
    """Compare what a file in ONNX Runtime's own format says about itself with its bytes.

    Raises:
        UserInputError: the file is missing, not a regular file, not of this format or over 2 GiB;
            the size of a tensor is not that of its type and shape, or it is in another file;
            subgraphs are nested more than 16 deep, or a node claims larger weights than it has.
        UnsupportedError: ONNX Runtime is not installed.
    """
    check_regular(path)
    if not 8 < path.stat().st_size <= MAX_BYTES:
        raise UserInputError(f"{path.name} has no size of a model", where=str(path))
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if view[4:8] != ORT_FORMAT:
        raise UserInputError(
            f"{path.name} is not in ONNX Runtime's own format", where=str(path), hint="export again"
        )
    purpose = "read a .ort file"
    require("onnxruntime.tools.ort_format_model", extra="onnx", purpose=purpose)
    message = require("ort_flatbuffers_py.fbs.InferenceSession", extra="onnx", purpose=purpose)
    walk = _Walk(path, view)
    try:
        walk.model(message.InferenceSession.GetRootAs(view, 0).Model())
    except _BROKEN as error:
        raise walk.broken(f"{type(error).__name__} {quoted(str(error), 80)}") from error
    return walk.found


class _Walk:
    """One walk over a file."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path, self.found, self.parts = path, OnnxFile(), 0
        self.start = _address(np.frombuffer(view, np.uint8))

    def broken(self, what: str) -> UserInputError:
        return UserInputError(
            f"{self.path.name} is broken: {what}",
            where=str(self.path),
            hint="it was changed or truncated: export it again",
        )

    def each(self, count: int, get: Callable[[int], Any]) -> Iterator[Any]:
        """The elements of a vector, of which a file may claim more than it has."""
        for index in range(count):
            self.parts += 1
            if self.parts > _MAX_PARTS:
                raise self.broken(f"it has more than {_MAX_PARTS} parts")
            yield get(index)

    def model(self, model: Any) -> None:
        for entry in self.each(model.MetadataPropsLength(), model.MetadataProps):
            self.found.metadata[_text(entry.Key())] = _text(entry.Value())
        self.graph(model.Graph(), 0, {})

    def graph(self, graph: Any, depth: int, outer: dict[str, TensorRow]) -> None:
        if depth > MAX_DEPTH:
            raise self.broken(f"graphs are nested more than {MAX_DEPTH} deep")
        if graph.SparseInitializersLength():
            raise self.broken("it has sparse tensors, which no exporter here writes")
        rows = [self.tensor(t) for t in self.each(graph.InitializersLength(), graph.Initializers)]
        tensors = outer | {row.name: row for row in rows}
        if not depth:
            self.found.tensors |= tensors
        for node in self.each(graph.NodesLength(), graph.Nodes):
            self.found.nodes += 1
            self.node(node, depth, tensors)

    def node(self, node: Any, depth: int, tensors: dict[str, TensorRow]) -> None:
        domain, known = _text(node.Domain()), dict[str, Any]()
        for attribute in self.each(node.AttributesLength(), node.Attributes):
            kind, value = attribute.Type(), None
            if kind >= _SPARSE or attribute.GraphsLength() or attribute.TensorsLength():
                raise self.broken("a node has an attribute that no exporter here writes")
            if kind == _INT:
                value = attribute.I()
            elif kind == _TENSOR:
                value = self.tensor(attribute.T())
            elif kind == _GRAPH:
                self.graph(attribute.G(), depth + 1, tensors)
            known[_text(attribute.Name())] = value
        names = [_text(name) for name in self.each(node.InputsLength(), node.Inputs)]
        given = [tensors.get(name) for name in names]
        plain = "" if domain == "ai.onnx" else domain
        check_node(_text(node.OpType()), plain, given, known, self.path)

    def tensor(self, tensor: Any) -> TensorRow:
        name, kind = _text(tensor.Name()), int(tensor.DataType())
        if tensor.ExternalDataOffset() >= 0:
            raise self.broken(f"{quoted(name)} is in another file")
        if tensor.DimsLength() > MAX_AXES or (kind not in BITS and kind != TEXT_TYPE):
            raise self.broken(f"{quoted(name)} has {tensor.DimsLength()} axes and type {kind}")
        shape = tuple(int(size) for size in self.each(tensor.DimsLength(), tensor.Dims))
        row = TensorRow(name, kind, shape)
        held = tensor.StringDataLength() if kind == TEXT_TYPE else tensor.RawDataLength()
        wanted = row.size if kind == TEXT_TYPE else -(-row.size * BITS[kind] // 8)
        if any(size < 0 for size in shape) or held != wanted:
            raise self.broken(f"{quoted(name)} {list(shape)} takes {wanted} and has {held} bytes")
        if kind == TEXT_TYPE or not held:
            return row
        data = tensor.RawDataAsNumpy()
        small = kind == _INT64 and held <= 8 * MAX_AXES
        numbers = tuple(data.view(np.int64).tolist()) if small else None
        return TensorRow(name, kind, shape, None, (_address(data) - self.start, held), numbers)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8")

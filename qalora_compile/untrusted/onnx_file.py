"""Check the structure of an ONNX file before any library reads it.

The file is a protobuf message, which is walked as bytes: no tensor is read or copied, and nothing
is allocated by a size that the file claims. The checks are those that ONNX, ONNX Runtime and their
advisories show to matter: places of external tensors, sizes against bytes, nesting, functions that
call each other without end, and attributes of kernels against the shapes of their weights.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import check_regular, quoted
from qalora_compile.untrusted.onnx_tensors import (
    BITS,
    MAX_MADE,
    TensorRow,
    check_node,
    external_file,
)
from qalora_compile.untrusted.protobuf import MAX_AXES, MessageReader, signed

MAX_BYTES = (1 << 31) - 1
"""Limit of a protobuf message."""
MAX_DEPTH, MAX_NODES = 16, 1 << 20
ORT_FORMAT = b"ORTM"
_CONTINUED = bytes(range(0x80, 0x100))
"""Bytes of an integer that are followed by another one."""
TEXT_TYPE = 8
_VALUES = (4, 5, 6, 7, 10, 11)
"""Fields of a tensor that may hold its values instead of raw bytes."""
_SINGULAR = {3, 5, 6, 22}
"""Fields of an attribute that protobuf would merge if they occur twice."""
Bytes = memoryview


@dataclass
class OnnxFile:
    """The contents of a file.

    Attributes:
        metadata: Metadata texts by name.
        tensors: Initializers of the outermost graph, by name.
        files: The other files that hold its tensors.
        nodes: Number of nodes, including those of subgraphs and functions.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, TensorRow] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)
    nodes: int = 0


def check_onnx(path: Path) -> OnnxFile:
    """Compare what an ONNX file says about itself with its bytes and its folder.

    Raises:
        UserInputError: the file is missing, not a regular file, not an ONNX model or over 2 GiB; a
            tensor is outside the folder or beyond the end of its file, or its size is not that of
            its type and shape; subgraphs are nested more than 16 deep, functions call each other
            in a circle, or a node claims larger weights than it has.
    """
    check_regular(path)
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise UserInputError(
            f"{path.name} has {size} bytes, and a model has 1 to {MAX_BYTES}", where=str(path)
        )
    with path.open("rb") as file:
        # The map is closed with its last view, which an error may hold.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if view[4:8] == ORT_FORMAT:
        raise UserInputError(
            f"{path.name} is in ONNX Runtime's own format, in which the graph is optimized already",
            where=str(path),
            hint="give the .onnx file that it was made from; sessions, generate, bench and verify "
            "on inputs also read a file whose name ends in .ort",
        )
    return _Walk(path).model(view)


def _address(data: Bytes) -> int:
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])


class _Walk(MessageReader):
    """One walk over a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.found = OnnxFile()
        self.calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
        self.start = 0

    def model(self, data: Bytes) -> OnnxFile:
        graphs = []
        self.start = _address(data)
        for number, value in self.fields(data):
            if number == 7:
                graphs.append(value)
            elif number == 14:
                name, text = self.pair(value)
                if name in self.found.metadata:
                    raise self.broken(f"its metadata name {quoted(name)} twice")
                self.found.metadata[name] = text
            elif number == 25:
                self.function(value)
            elif number == 20:
                raise self.broken("it holds a training graph")
        if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
            raise self.broken(f"it holds {len(graphs)} graphs")
        self.graph(graphs[0], 0, {}, set())
        self.check_calls()
        return self.found

    def graph(
        self, data: Bytes, depth: int, around: Mapping[str, TensorRow], called: set[tuple[str, str]]
    ) -> None:
        """A graph; returns the functions that its nodes call."""
        if depth > MAX_DEPTH:
            raise self.broken(f"subgraphs are nested more than {MAX_DEPTH} deep")
        tensors, nodes = dict(around), []
        for number, value in self.fields(data):
            if number == 5:
                row = self.tensor(value)
                if row.name in tensors and row.name not in around:
                    raise self.broken(f"the tensor {quoted(row.name)} occurs twice")
                tensors[row.name] = row
            elif number == 15:
                self.sparse(value)
            elif number == 1:
                nodes.append(value)
        if depth == 0:
            self.found.tensors = tensors
        self.nodes(nodes, depth, tensors, called)

    def function(self, data: Bytes) -> None:
        domain, name, nodes = "", "", []
        for number, value in self.fields(data):
            if number == 1:
                name = self.text(value)
            elif number == 10:
                domain = self.text(value)
            elif number == 7:
                nodes.append(value)
        if (domain, name) in self.calls:
            raise self.broken(f"the function {quoted(name)} occurs twice")
        self.calls[domain, name] = called = set[tuple[str, str]]()
        self.nodes(nodes, 0, {}, called)

    def nodes(
        self,
        nodes: list[Any],
        depth: int,
        tensors: dict[str, TensorRow],
        called: set[tuple[str, str]],
    ) -> None:
        self.found.nodes += len(nodes)
        if self.found.nodes > MAX_NODES:
            raise self.broken(f"it has more than {MAX_NODES} nodes")
        for data in nodes:
            domain, kind, inputs, outputs, attributes = self.node(data)
            called.add((domain, kind))
            known: dict[str, Any] = {}
            for attribute in attributes:
                name, value = self.attribute(attribute, depth, tensors, called)
                if name in known:
                    raise self.broken(f"a {kind} has the attribute {quoted(name)} twice")
                known[name] = value
            if kind == "Constant" and outputs and isinstance(known.get("value"), TensorRow):
                tensors[outputs[0]] = known["value"]
            check_node(kind, domain, [tensors.get(name) for name in inputs], known, self.path)

    def node(self, data: Any) -> tuple[str, str, list[str], list[str], list[Any]]:
        domain, kind = "", ""
        inputs: list[str] = []
        outputs: list[str] = []
        attributes = []
        for number, value in self.fields(data):
            if number in (1, 2):
                (inputs if number == 1 else outputs).append(self.text(value))
            elif number == 4:
                kind = self.text(value)
            elif number == 7:
                domain = self.text(value)
            elif number == 5:
                attributes.append(value)
        return ("" if domain == "ai.onnx" else domain), kind, inputs, outputs, attributes

    def attribute(
        self, data: Any, depth: int, tensors: Mapping[str, TensorRow], called: set[tuple[str, str]]
    ) -> tuple[str, Any]:
        """Name and value of an attribute; None if the value is not needed."""
        name, seen = "", set[int]()
        found: Any = None
        for number, value in self.fields(data):
            if number in seen:
                raise self.broken(f"the attribute {quoted(name)} has a value twice")
            seen |= {number} & _SINGULAR
            if number == 1:
                name = self.text(value)
            elif number == 3:
                found = signed(value) if isinstance(value, int) else None
            elif number in (5, 10):
                found = self.tensor(value)
            elif number in (22, 23):
                self.sparse(value)
            elif number in (6, 11):
                self.graph(value, depth + 1, tensors, called)
        return name, found

    def sparse(self, data: Any) -> None:
        """Check a sparse tensor; no reader of this package allocates its dense shape."""
        shape: list[int] = []
        for number, value in self.fields(data):
            if number in (1, 2):
                self.tensor(value)
            elif number == 3:
                shape += self.integers(value)
        if any(axis < 0 for axis in shape) or math.prod(shape) > MAX_MADE:
            raise self.broken(f"a sparse tensor is {quoted(shape)}")

    def tensor(self, data: Any) -> TensorRow:
        name = ""
        numbers = {2: 0, 14: 0}
        shape: list[int] = []
        external: dict[str, str] = {}
        stored: dict[int, int] = {}
        raw: Any = None
        for number, value in self.fields(data):
            if number == 1:
                shape += self.integers(value)
            elif number in numbers and isinstance(value, int):
                numbers[number] = value
            elif number == 8:
                name = self.text(value)
            elif number == 9:
                raw = value
            elif number == 13:
                self.add_place(external, value)
            elif number in _VALUES:
                stored[number] = stored.get(number, 0) + self.count(number, value)
        kind, location = numbers[2], numbers[14]
        self.check_shape(name, kind, shape)
        row = TensorRow(name, kind, tuple(shape), external if location == 1 else None)
        if location == 1:
            self.found.files.add(external_file(row, self.path)[0])
            return row
        if location or external:
            raise self.broken(f"{quoted(name)} is in the file and in another")
        self.check_tensor(row, raw, stored)
        row = self.placed(row, raw)
        small = kind == 7 and raw is not None and len(raw) <= 8 * MAX_AXES and len(raw) % 8 == 0
        return replace(row, numbers=tuple(raw.cast("q"))) if small else row

    def placed(self, row: TensorRow, raw: Any) -> TensorRow:
        """The row with the place of its raw bytes in the file."""
        if not raw:
            return row
        return replace(row, inside=(_address(raw) - self.start, len(raw)))

    def add_place(self, external: dict[str, str], data: Any) -> None:
        key, text = self.pair(data)
        if key in external:
            raise self.broken(f"the place of a tensor has {quoted(key)} twice")
        external[key] = text

    def check_shape(self, name: str, kind: int, shape: list[int]) -> None:
        if kind not in BITS and kind != TEXT_TYPE:
            raise self.broken(f"{quoted(name)} is of the unknown type {kind}")
        if len(shape) > MAX_AXES or any(axis < 0 for axis in shape):
            raise self.broken(f"the shape of {quoted(name)} is {quoted(shape)}")

    def check_tensor(self, row: TensorRow, raw: Any, stored: Mapping[int, int]) -> None:
        """Check that a tensor in the file has as many values as its shape says."""
        if raw is not None and (stored or row.kind == TEXT_TYPE):
            raise self.broken(f"{quoted(row.name)} has its values twice")
        if raw is not None:
            wanted = -(-row.size * BITS[row.kind] // 8)
            fits = isinstance(raw, memoryview) and len(raw) == wanted
        else:
            packs = {4: 2, 2: 4}.get(BITS.get(row.kind, 0), 1)
            parts = 2 if row.kind in (14, 15) else 1
            fits = sum(stored.values()) == -(-row.size * parts // packs) and len(stored) <= 1
        if not fits:
            raise self.broken(f"the bytes of {quoted(row.name)} do not fit its shape {row.shape}")

    def count(self, number: int, value: Any) -> int:
        """The number of values in a field of a tensor: 4 has floats, 5 int32, 6 texts, 7 int64."""
        if not isinstance(value, memoryview):
            return 1
        if number == 6:
            return 1
        if number in (4, 10):
            return len(value) // (4 if number == 4 else 8)
        return len(bytes(value).translate(None, _CONTINUED))

    def check_calls(self) -> None:
        """Check that no function calls itself, even indirectly, and that call depth is limited."""
        depth: dict[tuple[str, str], int] = {}
        for start in self.calls:
            waiting: list[tuple[tuple[str, str], bool]] = [(start, False)]
            open_ones: set[tuple[str, str]] = set()
            while waiting:
                name, left = waiting.pop()
                inner = [each for each in self.calls[name] if each in self.calls]
                if left:
                    open_ones.discard(name)
                    depth[name] = 1 + max((depth[each] for each in inner), default=0)
                    if depth[name] > MAX_DEPTH:
                        raise self.broken(f"functions call each other {depth[name]} deep")
                elif name not in depth:
                    open_ones.add(name)
                    if open_ones & set(inner):
                        raise self.broken(f"the function {quoted(name[1])} calls itself")
                    waiting.append((name, True))
                    waiting += [(each, False) for each in inner]

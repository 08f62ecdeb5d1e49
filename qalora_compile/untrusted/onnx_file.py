"""The structure of an ONNX file, checked before any library is given the file.

The file is a protobuf message. It is walked here as bytes: nothing of a tensor is read or copied,
and nothing is allocated that the file only claims. What is checked is what ONNX, ONNX Runtime and
their advisories show to matter: where tensors lie outside the file, sizes against bytes, nesting,
functions that call each other without end, and attributes of kernels against the shapes of their
weights.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import check_regular, member, quoted

MAX_BYTES = (1 << 31) - 1
"""Of a protobuf message."""
MAX_DEPTH, MAX_NODES, MAX_AXES = 16, 1 << 20, 16
_MAX_SIDE_BYTES = 1 << 16
_MAX_MADE = 1 << 31
"""Elements that constants alone may ask an operator to make when the file is loaded."""
_ORT_FORMAT = b"ORTM"
_CONTINUED = bytes(range(0x80, 0x100))
"""Bytes of an integer that are not its last."""
_BITS = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}
"""Bits of an element, by the number of a type (`onnx.TensorProto.DataType`)."""
_TEXT_TYPE = 8
_VALUES = (4, 5, 6, 7, 10, 11)
"""Fields of a tensor that hold its values, where raw bytes do not."""
_SINGULAR = {3, 5, 6, 22}
"""Fields of an attribute that protobuf would merge where they are there twice."""
_MICROSOFT, _QALORA = "com.microsoft", "qalora"
Bytes = memoryview


@dataclass(frozen=True)
class TensorRow:
    """What a file says of a tensor.

    Attributes:
        name, kind, shape: As they are said.
        external: `location`, `offset` and `length` of a tensor that lies in another file.
        numbers: Of a small tensor of int64 in the file, its values; else None.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    external: Mapping[str, str] | None = None
    numbers: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class OnnxFile:
    """What was found in a file.

    Attributes:
        metadata: Its texts by name.
        tensors: Initializers of the outermost graph, by name.
        files: The other files that its tensors lie in.
        nodes: How many nodes it has, bodies and functions included.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, TensorRow] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)
    nodes: int = 0


def check_onnx(path: Path) -> OnnxFile:
    """Hold what an ONNX file says of itself against its bytes and its folder.

    Raises:
        UserInputError: the file is missing, no regular file, no ONNX model or over 2 GiB; a tensor
            lies outside the folder, behind the end of its file, or has other bytes than its type
            and shape say; bodies are nested more than 16 deep, functions call each other in a
            circle, or a node says that its weights are larger than they are.
    """
    check_regular(path)
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise UserInputError(
            f"{path.name} has {size} bytes, and a model has 1 to {MAX_BYTES}", where=str(path)
        )
    with path.open("rb") as file:
        # closed when the last view of it goes, which an error may hold
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if view[4:8] == _ORT_FORMAT:
        raise UserInputError(
            f"{path.name} is in ONNX Runtime's own format, which cannot be checked",
            where=str(path),
            hint="give the .onnx file that it was made from; a file that you trust is loaded by "
            "runtime.open_session(path, trusted=True)",
        )
    return _Walk(path).model(view)


class _Walk:
    """One pass over a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, OnnxFile()
        self.calls: dict[tuple[str, str], set[tuple[str, str]]] = {}

    def model(self, data: Bytes) -> OnnxFile:
        graphs = []
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
        """A graph, and what its nodes call."""
        if depth > MAX_DEPTH:
            raise self.broken(f"bodies are nested more than {MAX_DEPTH} deep")
        tensors, nodes = dict(around), []
        for number, value in self.fields(data):
            if number == 5:
                row = self.tensor(value)
                if row.name in tensors and row.name not in around:
                    raise self.broken(f"the tensor {quoted(row.name)} is there twice")
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
            raise self.broken(f"the function {quoted(name)} is there twice")
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
        """Name and value of an attribute; None where the value is of no interest."""
        name, seen = "", set[int]()
        found: Any = None
        for number, value in self.fields(data):
            if number in seen:
                raise self.broken(f"the attribute {quoted(name)} has a value twice")
            seen |= {number} & _SINGULAR
            if number == 1:
                name = self.text(value)
            elif number == 3:
                found = _signed(value) if isinstance(value, int) else None
            elif number in (5, 10):
                found = self.tensor(value)
            elif number in (22, 23):
                self.sparse(value)
            elif number in (6, 11):
                self.graph(value, depth + 1, tensors, called)
        return name, found

    def sparse(self, data: Any) -> None:
        """A sparse tensor; the shape that it stands for is not allocated by any reader here."""
        shape: list[int] = []
        for number, value in self.fields(data):
            if number in (1, 2):
                self.tensor(value)
            elif number == 3:
                shape += self.integers(value)
        if any(axis < 0 for axis in shape) or math.prod(shape) > _MAX_MADE:
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
        small = kind == 7 and raw is not None and len(raw) <= 8 * MAX_AXES and len(raw) % 8 == 0
        return replace(row, numbers=tuple(raw.cast("q"))) if small else row

    def add_place(self, external: dict[str, str], data: Any) -> None:
        key, text = self.pair(data)
        if key in external:
            raise self.broken(f"the place of a tensor has {quoted(key)} twice")
        external[key] = text

    def check_shape(self, name: str, kind: int, shape: list[int]) -> None:
        if kind not in _BITS and kind != _TEXT_TYPE:
            raise self.broken(f"{quoted(name)} is of the unknown type {kind}")
        if len(shape) > MAX_AXES or any(axis < 0 for axis in shape):
            raise self.broken(f"the shape of {quoted(name)} is {quoted(shape)}")

    def check_tensor(self, row: TensorRow, raw: Any, stored: Mapping[int, int]) -> None:
        """See that a tensor in the file has as many values as its shape says."""
        if raw is not None and (stored or row.kind == _TEXT_TYPE):
            raise self.broken(f"{quoted(row.name)} has its values twice")
        if raw is not None:
            wanted = -(-row.size * _BITS[row.kind] // 8)
            fits = isinstance(raw, memoryview) and len(raw) == wanted
        else:
            packs = {4: 2, 2: 4}.get(_BITS.get(row.kind, 0), 1)
            parts = 2 if row.kind in (14, 15) else 1
            fits = sum(stored.values()) == -(-row.size * parts // packs) and len(stored) <= 1
        if not fits:
            raise self.broken(f"{quoted(row.name)} has other bytes than its shape {row.shape} says")

    def check_calls(self) -> None:
        """See that no function calls itself, through whatever others, or grows without measure."""
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

    def fields(self, data: Any) -> Iterator[tuple[int, Any]]:
        """Number and value of each field: an integer, or the bytes of a longer one."""
        if not isinstance(data, memoryview):
            raise self.broken("a message is a number")
        at, end = 0, len(data)
        while at < end:
            tag, at = self.varint(data, at)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = self.varint(data, at)
                yield number, value
                continue
            if wire == 2:
                length, at = self.varint(data, at)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise self.broken("it is no protobuf message")
            if number == 0 or length > end - at:
                raise self.broken("it is cut short, or no protobuf message")
            yield number, data[at : at + length]
            at += length

    def varint(self, data: Bytes, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                raise self.broken("it is cut short, or no protobuf message")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
        raise self.broken("it is no protobuf message")

    def integers(self, value: Any) -> list[int]:
        """A repeated integer: one, or several packed."""
        if isinstance(value, int):
            return [_signed(value)]
        found, at = [], 0
        while at < len(value):
            number, at = self.varint(value, at)
            found.append(_signed(number))
            if len(found) > MAX_AXES:
                raise self.broken(f"a tensor has more than {MAX_AXES} axes")
        return found

    def count(self, number: int, value: Any) -> int:
        """How many values a field of a tensor holds: 4 has floats, 5 int32, 6 texts, 7 int64."""
        if not isinstance(value, memoryview):
            return 1
        if number == 6:
            return 1
        if number in (4, 10):
            return len(value) // (4 if number == 4 else 8)
        return len(bytes(value).translate(None, _CONTINUED))

    def pair(self, data: Any) -> tuple[str, str]:
        found = {1: "", 2: ""}
        for number, value in self.fields(data):
            if number in found:
                found[number] = self.text(value)
        return found[1], found[2]

    def text(self, value: Any) -> str:
        if not isinstance(value, memoryview):
            raise self.broken("a text is a number")
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken("a text is no UTF-8") from error

    def broken(self, what: str) -> UserInputError:
        return UserInputError(
            f"{self.path.name} is no ONNX model that can be read: {what}",
            where=str(self.path),
            hint="export it again; a truncated file cannot be repaired",
        )


def external_file(row: TensorRow, path: Path) -> tuple[Path, int, int]:
    """The file, the offset and the length of a tensor that lies outside the model's file.

    Raises:
        UserInputError: the place is not said in numbers, the file is not in the model's folder, or
            the tensor's bytes are not all in it.
    """
    stated = row.external or {}
    unknown = stated.keys() - {"location", "offset", "length", "checksum"}
    odd = [key for key in ("offset", "length") if not _is_size(stated.get(key, "0"))]
    if unknown or odd or row.kind not in _BITS:
        what = ", ".join(f"{key} {quoted(stated.get(key))}" for key in (*unknown, *odd)) or "a text"
        raise UserInputError(f"the place of {quoted(row.name)} is said by {what}", where=str(path))
    file = member(path.parent, stated.get("location"))
    if file.resolve() == path.resolve():
        raise UserInputError(f"{quoted(row.name)} lies in the model's own file", where=str(path))
    offset, size = int(stated.get("offset", "0")), file.stat().st_size
    wanted = -(-row.size * _BITS[row.kind] // 8)
    length = int(stated.get("length", str(wanted)))
    if length != wanted or offset + length > size:
        raise UserInputError(
            f"{quoted(row.name)} {list(row.shape)} takes {wanted} bytes, and is said to be "
            f"{length} bytes behind {offset} of {file.name}, which has {size}",
            where=str(path),
            hint="the two files do not belong together, or one is truncated: export again",
        )
    return file, offset, length


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def check_node(
    kind: str,
    domain: str,
    inputs: list[TensorRow | None],
    attributes: Mapping[str, Any],
    path: Path,
) -> None:
    """Hold a node's attributes against its constant inputs, where kernels trust them.

    ONNX Runtime packs weights when it loads a file, and up to 1.27 took their size from the
    attributes alone; what constants ask for is allocated then too.

    Raises:
        UserInputError: the weights are smaller than the attributes say, or more than 2³¹ elements
            are asked for.
    """
    if kind == "ConstantOfShape" and not domain and inputs and inputs[0] is not None:
        asked = inputs[0].numbers or ()
        if any(axis < 0 for axis in asked) or math.prod(asked) > _MAX_MADE:
            raise UserInputError(f"a {kind} is to make {list(asked)} elements", where=str(path))
    for index, wanted in _packed_shapes(kind, domain, attributes).items():
        given = inputs[index] if index < len(inputs) else None
        if given is not None and given.shape not in wanted(given):
            raise UserInputError(
                f"a {kind} says that its input {index} ({quoted(given.name)}) is "
                f"{list(wanted(given)[0])}, and it is {list(given.shape)}",
                where=str(path),
                hint="the file was changed, or written by a broken exporter: export it again",
            )


def _packed_shapes(kind: str, domain: str, attributes: Mapping[str, Any]) -> dict[int, Any]:
    """For each input of a node on codes, the shapes that its attributes allow.

    Scales and zero-points may be flat; zero-points of MatMulNBits are packed where they are bytes.
    """
    ours = (domain, kind) == (_QALORA, "GroupQuantLinear")
    if not ours and (domain, kind) != (_MICROSOFT, "MatMulNBits"):
        return {}
    defaults = {"K": 0, "N": 0, "bits": 4, "group_size" if ours else "block_size": 0}
    k, n, bits, block = (attributes.get(name, default) for name, default in defaults.items())
    numbers = [v for v in (k, n, bits, block) if isinstance(v, int) and 0 < v < 1 << 31]
    if len(numbers) != 4 or bits > 8:
        return {1: lambda _: [(0, 0, 0)]}
    blocks = -(-k // block)
    groups = [(n, blocks), (n * blocks,), (n, blocks, 1)]
    packed = -(-blocks * bits // 8)
    zeros = [(n, packed), (n * packed,)]
    return {
        1: lambda _: [(n, blocks, block * bits // 8)],
        2: lambda _: groups,
        3: lambda given: zeros if given.kind == 2 and not ours else groups,
    }

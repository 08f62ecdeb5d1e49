"""Lookups in quantized tables of exported models as rows of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qalora_compile.verify.proof.graphs.graph import Graph, Node, Tensor
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.weights import dequantize
from qalora_compile.verify.proof.weights.linear_map import (
    Linear,
    NotLinearError,
    added,
    identity,
    looked_up,
    scaled,
)

_FLOAT, _UINT8 = 1, 2  # of ONNX's TensorProto.DataType
_BITS = {"uint2": 2, "uint4": 4, "uint8": 8}
LOOKUP_ENDS = ("onnx.Slice", "onnx.Reshape", "onnx.DequantizeLinear")
"""Operators with which a lookup of codes can end."""
_LOOKUPS = (*LOOKUP_ENDS, "onnx.Add", "onnx.Mul")


def lookup_values(graph: Graph, path: str) -> list[str]:
    """The values that are looked up in the tables below a module path, in graph order."""
    found: dict[str, list[str]] = {}
    for name, node in graph.nodes.items():
        if node.op not in _LOOKUPS:
            continue
        reader = _Reader(graph)
        try:
            reader.linear(node)
        except NotLinearError:
            continue
        if reader.names and all(table.startswith(f"{path}.") for table in reader.names):
            found[name] = reader.inner
    inside = {name for names in found.values() for name in names}
    return [name for name in found if name not in inside]


def lookup_linear(graph: Graph, node: Node) -> Linear:
    """A lookup as a linear map of the one-hot encoded row number.

    Raises:
        NotLinearError: it does not have the form that an exporter of this package writes.
    """
    return _Reader(graph).linear(node)


@dataclass(frozen=True)
class _Rows:
    """Gathered rows of a stored table: its values, their bits, and the row numbers."""

    stored: StoredTensor
    bits: int
    ids: Any


class _Reader:
    """Reads one lookup and records its tables and the lookups that it consists of."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.names: list[str] = []
        self.inner: list[str] = []
        self._leads: set[int] = set()

    def linear(self, node: Node) -> Linear:
        """A value as a lookup."""
        if node.op == "onnx.Add":
            first, second = (self._part(v) for v in node.args)
            return added(first, second)
        if node.op == "onnx.Mul":
            first, second = node.args
            if self._number(second) is None:
                first, second = second, first
            factor = self._number(second)
            if factor is None:
                raise self._no(node)
            return scaled(self._part(first), factor)
        if node.op == "onnx.DequantizeLinear":
            return self._flat(node)
        return self._blocks(node)

    def _part(self, operand: Any) -> Linear:
        node = self._node(operand)
        self.inner.append(node.name)
        return self.linear(node)

    def _blocks(self, node: Node) -> Linear:
        """Unpacked rows of `[V, L, block]` minus zero-points, times scales; the first K values."""
        size, value = self._first(node)
        tail, value = self._reshaped(value)
        product = self._node(value, "onnx.Mul")
        level = next((n for v in product.args if (n := self._maybe(v, "onnx.Sub"))), None)
        steps = [v for v in product.args if self._maybe(v, "onnx.Sub") is None]
        if level is None or len(steps) != 1 or len(tail) != 1:
            raise self._no(node)
        scale = self._gathered(self._cast(self._unsqueezed(steps[0])))
        block, value = self._reshaped(self._cast(level["A"]))
        codes = self._unpacked(value)
        zero = self._zero(self._cast(self._unsqueezed(level["B"])))
        k = tail[0] if size is None else size
        if len(block) != 2 or block[0] * block[1] != tail[0] or len(self._leads) != 1:
            raise self._no(node)
        if not codes.ids == scale.ids == zero.ids:
            raise NotLinearError(f"parts of a row are looked up by different numbers: {node.line}")
        table, count = codes.stored, codes.stored.shape[0]
        shapes = (count, block[0], block[1] * codes.bits // 8), (count, block[0])
        if (table.shape, scale.stored.shape) != shapes or zero.stored.shape[0] != count:
            raise NotLinearError(f"the tables of a lookup do not fit together: {node.line}")
        self.names.append(table.name)
        source = (codes.ids,)
        if zero.stored.dtype == "uint8":
            if zero.bits != codes.bits:
                raise self._no(node)
            reading = identity(source, k)
            part = dequantize.nbits(reading, table, scale.stored, zero.stored, codes.bits, block[1])
        else:
            part = dequantize.group_quant(table, scale.stored, zero.stored, codes.bits, block[1])
        return looked_up(source, count, k, part)

    def _zero(self, operand: Any) -> _Rows:
        """Zero-points: a row of numbers or of codes, of which only the first are used."""
        gathered = self._maybe(operand, "onnx.Gather")
        if gathered is not None:
            return self._gathered(operand)
        _, value = self._first(self._node(operand))
        tail, value = self._reshaped(value)
        if tail != [-1]:
            raise self._no(self._node(operand))
        return self._unpacked(value)

    def _flat(self, node: Node) -> Linear:
        """Transposed columns of `[K, V]`: blocked DequantizeLinear along the last axis."""
        block = int(node.options.get("block_size", 0))
        if node.options.get("axis", 1) != -1 or block < 1 or len(node.args) != 3:
            raise self._no(node)
        (codes, ids), (scale, other), (zero, third) = (self._columns(v) for v in node.args)
        k, count = codes.shape
        sizes = (-(-k // block), count)
        if not ids == other == third or (scale.shape, zero.shape) != (sizes, sizes):
            raise NotLinearError(f"the tables of a lookup do not fit together: {node.line}")
        if codes.dtype not in _BITS or zero.dtype != codes.dtype:
            raise self._no(node)
        self.names.append(codes.name)
        part = dequantize.blocks(codes, scale, zero, _BITS[codes.dtype], block, k)
        return looked_up((ids,), count, k, part)

    def _columns(self, operand: Any) -> tuple[StoredTensor, Any]:
        """A stored `[K, V]` of which columns are gathered, and their numbers."""
        node = self._node(operand, "onnx.Gather")
        if node.options.get("axis", 0) != 0:
            raise self._no(node)
        table, ids = node.args
        turn = self._maybe(table, "onnx.Transpose")
        if turn is not None:
            if turn.options.get("perm", (1, 0)) != (1, 0):
                raise self._no(turn)
            cast = self._maybe(turn["data"], "onnx.Cast")
            whole_numbers = cast is not None and cast.options["to"] == _UINT8
            stored = self._stored(cast["input"] if cast and whole_numbers else turn["data"])
        else:
            rows = self._stored(table)
            if rows.dtype in ("uint4", "uint2"):
                raise self._no(node)  # a stream of bits cannot be transposed
            stored = StoredTensor(rows.name, rows.dtype, rows.shape[::-1], lambda: rows.read().T)
        if len(stored.shape) != 2:
            raise self._no(node)
        return stored, ids

    def _unpacked(self, operand: Any) -> _Rows:
        """Gathered bytes as codes, low bits first."""
        if self._maybe(operand, "onnx.Gather") is not None:
            return self._gathered(operand)
        masked = self._node(operand, "onnx.BitwiseAnd")
        shift = self._node(masked["A"], "onnx.BitShift")
        found = self._gathered(self._unsqueezed(shift["X"]))
        shifts, mask = self._values(shift["Y"]), self._values(masked["B"])
        bits = 8 // max(1, len(shifts))
        right = shift.options.get("direction") == "RIGHT"
        if not right or shifts != list(range(0, 8, bits)) or mask != [2**bits - 1]:
            raise self._no(masked)
        return _Rows(found.stored, bits, found.ids)

    def _gathered(self, operand: Any) -> _Rows:
        node = self._node(operand, "onnx.Gather")
        if node.options.get("axis", 0) != 0:
            raise self._no(node)
        return _Rows(self._stored(node["data"]), 8, node["indices"])

    def _first(self, node: Node) -> tuple[int | None, Any]:
        """How many values along the last axis are kept, and the operand."""
        if node.op != "onnx.Slice":
            return None, node
        start, stop, axes = (self._values(node.get(name)) for name in ("starts", "ends", "axes"))
        if (start, axes) != ([0], [-1]) or len(stop) != 1 or node.get("steps") is not None:
            raise self._no(node)
        self.inner.append(self._node(node["data"]).name)
        return stop[0], node["data"]

    def _reshaped(self, operand: Any) -> tuple[list[int], Any]:
        """The last axes of a Reshape that keeps the axes of the ids, and its operand."""
        node = operand if isinstance(operand, Node) else self._node(operand)
        if node.op != "onnx.Reshape" or node.options.get("allowzero", 0):
            raise self._no(node)
        shape = self._values(node["shape"])
        lead = next((i for i, size in enumerate(shape) if size != 0), len(shape))
        self._leads.add(lead)
        return shape[lead:], node["data"]

    def _unsqueezed(self, operand: Any) -> Any:
        node = self._node(operand, "onnx.Unsqueeze")
        if self._values(node["axes"]) != [-1]:
            raise self._no(node)
        return node["data"]

    def _cast(self, operand: Any) -> Any:
        node = self._maybe(operand, "onnx.Cast")
        return node["input"] if node is not None and node["to"] == _FLOAT else operand

    def _maybe(self, operand: Any, op: str) -> Node | None:
        node = operand if isinstance(operand, Node) else self._graph.node(operand)
        return node if node is not None and node.op == op else None

    def _node(self, operand: Any, op: str = "") -> Node:
        node = operand if isinstance(operand, Node) else self._graph.node(operand)
        if node is None or (op and node.op != op):
            raise NotLinearError(f"no lookup in stored tables: {self._graph.line(operand)}")
        return node

    def _stored(self, operand: Any) -> StoredTensor:
        if not isinstance(operand, Tensor):
            raise NotLinearError(f"an operand is computed: {self._graph.line(operand)}")
        return self._graph.tensors[operand.name]

    def _values(self, operand: Any) -> list[int]:
        """A small stored tensor of integers; None for other operands."""
        if not isinstance(operand, Tensor):
            return []
        stored = self._graph.tensors[operand.name]
        if stored.size > 8 or not stored.dtype.startswith(("int", "uint8")):
            return []
        return [int(v) for v in stored.values().reshape(-1)]

    def _number(self, operand: Any) -> float | None:
        if isinstance(operand, Tensor) and self._graph.tensors[operand.name].size == 1:
            return float(self._graph.tensors[operand.name].wide().reshape(-1)[0])
        return None

    def _no(self, node: Node) -> NotLinearError:
        return NotLinearError(f"no lookup in stored tables: {node.line}")

"""Sites of OpenVINO models as linear maps: the constants that their plugins dequantize."""

from __future__ import annotations

import dataclasses
from typing import Any

from qalora_compile.verify.proof.graphs.graph import Graph, Node, SiteRow, Tensor
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.weights import dequantize
from qalora_compile.verify.proof.weights.linear_map import (
    Linear,
    NotLinearError,
    Reading,
    applied,
    identity,
    looked_up,
    pad_groups,
    padded,
    with_bias,
)

_ADD, _CONVERT, _GATHER, _MATMUL = (
    f"openvino.{kind}" for kind in ("Add", "Convert", "Gather", "MatMul")
)
_MULTIPLY, _PAD, _RESHAPE, _SLICE, _SUBTRACT = (
    f"openvino.{kind}" for kind in ("Multiply", "Pad", "Reshape", "Slice", "Subtract")
)
_BYTE = 8


def openvino_linear(graph: Graph, site: SiteRow) -> Linear:
    """The linear map that the nodes of a site compute.

    Raises:
        NotLinearError: they do not have the form that the exporter writes.
    """
    value = graph.nodes.get(graph.site_values.get(site.name, ""))
    if value is None:
        raise NotLinearError("no node computes the site")
    return _Reader(graph, site).linear(value)


def _columns(graph: Graph, operand: Any) -> int:
    """The number of columns of a weight, from the shape that it is given."""
    node = graph.node(operand)
    assert node is not None, "the weight is the result of a Reshape"
    _, shape = node.args
    if not isinstance(shape, Tensor):
        raise NotLinearError(f"the shape of a weight is computed: {node.line}")
    return int(graph.tensors[shape.name].read().reshape(-1)[1])


class _Reader:
    """Reads one site."""

    def __init__(self, graph: Graph, site: SiteRow) -> None:
        self._graph, self._site = graph, site

    def linear(self, node: Node) -> Linear:
        """A computed value as a linear map."""
        if node.op == _ADD:
            product, bias = node.args
            return with_bias(self.linear(self._node(product, _MATMUL)), self._vector(bias))
        if node.op == _MATMUL:
            return self._product(node)
        if node.op in (_GATHER, _SLICE):
            return self._lookup(node)
        raise NotLinearError(f"no linear map by stored weights: {node.line}")

    def _product(self, node: Node) -> Linear:
        x, weight = node.args
        if node.options.get("transpose_a") or not node.options.get("transpose_b"):
            raise NotLinearError(f"the weight is not [N, K]: {node.line}")
        codes, part = self._weight(weight)
        return applied(self._reading(x), codes.shape[0], part)

    def _lookup(self, node: Node) -> Linear:
        if node.op == _SLICE:  # the first K of the stored values
            gathered, *_ = node.args
            node = self._node(gathered, _GATHER)
        weight, ids, axis = node.args
        if self._number(axis) != 0:
            raise NotLinearError(f"no rows are looked up: {node.line}")
        codes, part = self._weight(weight)
        return looked_up((ids,), codes.shape[0], self._site.k, part)

    def _weight(self, operand: Any) -> tuple[StoredTensor, Any]:
        """Reshape(Multiply(Subtract(codes, zero_point), scale)), as rows."""
        product, _ = self._node(operand, _RESHAPE).args
        level, scale = self._node(product, _MULTIPLY).args
        codes, zero_point = self._node(level, _SUBTRACT).args
        stored = self._stored(codes)
        step, zero = (self._of_groups(self._stored(part)) for part in (scale, zero_point))
        n, groups, _ = stored.shape
        width = _columns(self._graph, operand) // groups
        bits = stored.size * _BYTE // (n * groups * width)
        return stored, dequantize.group_quant(stored, step, zero, bits, width)

    def _of_groups(self, stored: StoredTensor) -> StoredTensor:
        """Scale or zero-point `[N, L, 1]` as `[N, L]`."""
        shape = stored.shape[:2]
        if stored.shape != (*shape, 1):
            raise NotLinearError(f"{stored.name} has the shape {list(stored.shape)}")
        return dataclasses.replace(stored, shape=shape, read=lambda: stored.read().reshape(shape))

    def _reading(self, operand: Any) -> Reading:
        """The value that a product reads, as a reading of the site's input."""
        node = self._graph.node(operand)
        if node is not None and node.op == _PAD:
            x, amount = self._padding(node)
            return padded(self._reading(x), amount)
        if node is not None and node.op == _RESHAPE:
            wider, _ = node.args
            inner = self._graph.node(wider)
            if inner is not None and inner.op == _PAD:  # the end of each group
                grouped, amount = self._padding(inner)
                x, shape = self._node(grouped, _RESHAPE).args
                group = int(self._stored(shape).wide().reshape(-1)[-1])
                return pad_groups(self._reading(x), group, group + amount)
        return identity((operand,), self._site.k)

    def _padding(self, node: Node) -> tuple[Any, int]:
        """What a Pad reads, and how many zeros it appends to the last axis."""
        x, begin, end, *value = node.args
        first, last = (self._stored(part).wide().reshape(-1) for part in (begin, end))
        if first.any() or last[:-1].any() or any(self._number(part) for part in value):
            raise NotLinearError(f"more is padded than the end of each row: {node.line}")
        return x, int(last[-1])

    def _vector(self, operand: Any) -> StoredTensor:
        """A stored bias; its leading axes of one are dropped."""
        stored = self._stored(operand)
        shape = stored.shape[-1:]
        return dataclasses.replace(stored, shape=shape, read=lambda: stored.read().reshape(shape))

    def _stored(self, operand: Any) -> StoredTensor:
        """A constant, possibly widened, which is exact."""
        node = self._graph.node(operand)
        if node is not None and node.op == _CONVERT:
            (operand,) = node.args
        if not isinstance(operand, Tensor):
            raise NotLinearError(f"an operand is computed: {self._graph.line(operand)}")
        return self._graph.tensors[operand.name]

    def _number(self, operand: Any) -> float:
        return float(self._stored(operand).wide().reshape(()))

    def _node(self, operand: Any, op: str) -> Node:
        node = self._graph.node(operand)
        if node is None or node.op != op:
            raise NotLinearError(f"not {op}: {self._graph.line(operand)}")
        return node

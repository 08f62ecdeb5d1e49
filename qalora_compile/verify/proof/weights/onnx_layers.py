"""Sites of exported models as linear maps, for the node forms of every target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qalora_compile.verify.proof.graphs.graph import Graph, Node, Ref, SiteRow, Tensor
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.weights import dequantize
from qalora_compile.verify.proof.weights.fx_layers import activations, digits_of
from qalora_compile.verify.proof.weights.linear_map import (
    Linear,
    NotLinearError,
    Reading,
    Rows,
    added,
    applied,
    composed,
    group_sums,
    identity,
    pad_groups,
    padded,
    part_of,
    scaled,
    side_by_side,
    with_bias,
)
from qalora_compile.verify.proof.weights.onnx_embeddings import LOOKUP_ENDS, lookup_linear
from qalora_compile.verify.proof.weights.onnx_experts import expert_linear, expert_rows
from qalora_compile.verify.proof.weights.onnx_functions import Body, body_of

GROUP_QUANT, NBITS = "qalora.GroupQuantLinear", "com.microsoft.MatMulNBits"
_FLOAT = 1
_BITS = {"uint2": 2, "uint4": 4, "uint8": 8}
_BODY_ROUNDINGS = 3
"""Roundings of a weight or correction that a function computes in float32."""


def onnx_linear(graph: Graph, site: SiteRow) -> Linear:
    """The linear map of a site's nodes, with every operator read by its specification.

    Raises:
        NotLinearError: they do not have a form that an exporter of this package writes.
    """
    return _Reader(graph, site.k).linear(_output(graph, site))


def function_linears(graph: Graph, site: SiteRow, stated: Linear) -> dict[str, Linear]:
    """The linear maps of a site's nodes by the model-local functions, if there are any.

    `functions` reads GroupQuantLinear by its function, like a runtime without the operator library,
    and `standard functions` also MatMulNBits by its function, like a runtime without a kernel for
    it. Their constants stay in memory as long as these maps.

    Args:
        graph: The model.
        site: The site.
        stated: The map by the operators, with the rounding of its stored tensors.

    Raises:
        NotLinearError: a function does not have a form that an exporter of this package writes.
    """
    value, found, subgraphs = _output(graph, site), dict[str, Linear](), dict[str, Body]()
    inlined = frozenset({GROUP_QUANT})
    if ("qalora", "GroupQuantLinear") in graph.functions:
        found["functions"] = _Reader(graph, site.k, inlined, subgraphs=subgraphs).linear(value)
        if ("com.microsoft", "MatMulNBits") in graph.functions:
            inlined |= {NBITS}
            reader = _Reader(graph, site.k, inlined, subgraphs=subgraphs)
            found["standard functions"] = reader.linear(value)
    return {name: _as_stored(linear, stated) for name, linear in found.items()}


def _as_stored(linear: Linear, stated: Linear) -> Linear:
    """The map with the rounding of `stated`, from whose tensors it is computed."""
    if linear.source != stated.source:
        raise NotLinearError("a function reads another input than its operator")

    def rows(part: slice, expert: int) -> Rows:
        found, known = linear.rows(part, expert), stated.rows(part, expert)
        return dataclasses.replace(found, radius=found.radius + known.radius)

    return dataclasses.replace(linear, rows=rows)


def _check_sizes(node: Node, packed: StoredTensor, k: int, group_size: int, bits: int) -> None:
    """Compare the sizes that a kernel's attributes state with those of its codes `[N, L, bytes]`.

    Raises:
        NotLinearError: they differ.
    """
    sizes, held = (int(node.options["K"]), int(node.options["N"])), (k, packed.shape[0])
    if sizes != held:
        raise NotLinearError(f"attributes K, N are {sizes}, not {held}")
    if packed.shape[2] * 8 != group_size * bits:
        raise NotLinearError(f"{packed.shape[2]} bytes hold no {group_size} codes of {bits} bits")


def _output(graph: Graph, site: SiteRow) -> Ref:
    value = graph.site_values.get(site.name, "")
    if value not in graph.nodes:
        raise NotLinearError("no node computes the site")
    return Ref(value)


class _Reader:
    """Reads one site.

    Args:
        graph: The graph of the site, or of a function.
        k: Columns of the effective weight.
        inlined: Operators that are read by their functions.
        roundings: Number of roundings of a stored matrix.
        bodies: The functions of this graph's nodes on their constants, by node.
    """

    def __init__(
        self,
        graph: Graph,
        k: int,
        inlined: frozenset[str] = frozenset(),
        roundings: int = 1,
        subgraphs: dict[str, Body] | None = None,
    ) -> None:
        self._graph, self._k, self._inlined, self._roundings = graph, k, inlined, roundings
        self._bodies = {} if subgraphs is None else subgraphs
        self._of_experts = False
        self._readers: dict[str, Callable[[Node], Linear]] = {
            "onnx.Add": self._add,
            "onnx.Mul": self._mul,
            "onnx.MatMul": self._matmul,
            "onnx.Gemm": self._gemm,
            "onnx.Split": self._part,
            "onnx.Concat": self._experts,
            NBITS: self._nbits,
            GROUP_QUANT: self._group_quant,
        }

    def linear(self, operand: Any) -> Linear:
        """A computed value as a linear map."""
        node = self._graph.node(operand)
        if node is not None and self._is_lookup(node):
            return lookup_linear(self._graph, node)
        if node is None or node.op not in self._readers:
            raise NotLinearError(f"no linear map by stored weights: {self._graph.line(operand)}")
        if node.op in self._inlined:
            return self._inline(node)
        return self._readers[node.op](node)

    def _is_lookup(self, node: Node) -> bool:
        """Whether a node computes rows of a table, unlike the nodes of a layer."""
        parts = node.args if node.op in ("onnx.Add", "onnx.Mul") else ()
        operands = [n for n in map(self._graph.node, parts) if n is not None]
        return node.op in LOOKUP_ENDS or (bool(operands) and all(map(self._is_lookup, operands)))

    def reading(self, operand: Any) -> Reading:
        """The value that a layer reads, as a reading of the site's input."""
        node = self._graph.node(operand)
        if node is not None and self._of_experts:
            rows = expert_rows(self._graph, node, self.reading)
            if rows is not None:
                return rows
        if node is not None:
            for read in (self._sum, self._group_pad, self._joined, self._padded):
                found = read(node)
                if found is not None:
                    return found
        return identity((operand,), self._k)

    def _inline(self, node: Node) -> Linear:
        """A node by its function: constants are evaluated, nodes that depend on x are read."""
        x, *weight = node.args
        stored = [self._stored(operand) for operand in weight[:3]]
        if node.name not in self._bodies:
            self._bodies[node.name] = body_of(self._graph, node, stored)
        body, result = self._bodies[node.name]
        inner = self.reading(x)
        made = _Reader(body, inner.width, self._inlined, _BODY_ROUNDINGS).linear(result)
        if made.source != (Ref(body.extra),):
            raise NotLinearError("the function does not read only its input")
        if made.bias:
            raise NotLinearError("the function adds a bias")
        return applied(inner, made.n, made.rows, notes=made.notes)

    def _value(self, operand: Any) -> list[int] | None:
        """A small stored tensor of integers."""
        if not isinstance(operand, Tensor):
            return None
        values = self._graph.tensors[operand.name].values()
        return [int(v) for v in values.reshape(-1)]

    def _tail(self, node: Node) -> list[int] | None:
        """The sizes by which Reshape replaces the last axes if it keeps the others."""
        shape = node["shape"]
        found = self._value(shape)
        if found is not None:
            kept = next((i for i, size in enumerate(found) if size != 0), len(found))
            return found[kept:]
        joined = self._graph.node(shape)
        if joined is None or joined.op != "onnx.Concat" or joined.options.get("axis") != 0:
            return None
        first, *rest = joined.args
        lead = self._graph.node(first)
        keeps = lead is not None and lead.op == "onnx.Shape" and lead.options.get("end") == -1
        if (
            not keeps
            or lead is None
            or lead.options.get("start", 0)
            or lead.args != (node["data"],)
        ):
            return None
        sizes = [self._value(operand) for operand in rest]
        return None if None in sizes else [v for size in sizes if size for v in size]

    def _sum(self, node: Node) -> Reading | None:
        if node.op != "onnx.ReduceSum" or node.options.get("keepdims", 1) != 0:
            return None
        reshaped = self._graph.node(node["data"])
        if (
            self._value(node.get("axes")) != [-1]
            or reshaped is None
            or reshaped.op != "onnx.Reshape"
        ):
            return None
        tail = self._tail(reshaped)
        if tail is None or len(tail) != 2:
            return None
        inner = self.reading(reshaped["data"])
        if inner.width != tail[0] * tail[1]:
            raise NotLinearError(f"{tail[0]} sums of {tail[1]} values are taken of {inner.width}")
        return group_sums(inner, tail[1])

    def _group_pad(self, node: Node) -> Reading | None:
        """Reshape of Pad of Reshape, which pads every group."""
        pad = self._graph.node(node["data"]) if node.op == "onnx.Reshape" else None
        split = self._graph.node(pad["data"]) if pad is not None and pad.op == "onnx.Pad" else None
        if pad is None or split is None or split.op != "onnx.Reshape":
            return None
        joined, tail, amount = self._tail(node), self._tail(split), self._pad_amount(pad)
        if joined is None or tail is None or amount is None or (len(joined), len(tail)) != (1, 2):
            return None
        inner = self.reading(split["data"])
        width = tail[1] + amount
        if inner.width != tail[0] * tail[1] or joined[0] != tail[0] * width:
            raise NotLinearError(
                f"groups of {tail[1]} of {inner.width} values are padded to {width}"
            )
        return pad_groups(inner, tail[1], width)

    def _joined(self, node: Node) -> Reading | None:
        if node.op != "onnx.Concat" or node.options.get("axis") != -1:
            return None
        parts = [self.reading(part) for part in node.args]
        joins = len(parts) > 1 and all(part.sums for part in parts[1:])
        return side_by_side(parts) if joins else None

    def _padded(self, node: Node) -> Reading | None:
        amount = self._pad_amount(node) if node.op == "onnx.Pad" else None
        return None if amount is None else padded(self.reading(node["data"]), amount)

    def _pad_amount(self, node: Node) -> int | None:
        """The number of zeros that Pad appends to the last axis, if it adds no others."""
        pads = self._value(node.get("pads"))
        filled = node.get("constant_value")
        if filled is not None and self._number(filled) != 0:
            return None
        plain = node.options.get("mode", "constant") == "constant" and node.get("axes") is None
        if pads is None or not plain or any(pads[:-1]):
            return None
        return pads[-1]

    def _number(self, operand: Any) -> float | None:
        """A stored tensor of one element."""
        if isinstance(operand, Tensor) and self._graph.tensors[operand.name].size == 1:
            return float(self._graph.tensors[operand.name].wide().reshape(-1)[0])
        return None

    def _stored(self, operand: Any) -> StoredTensor:
        if not isinstance(operand, Tensor):
            raise NotLinearError(f"an operand is computed: {self._graph.line(operand)}")
        return self._graph.tensors[operand.name]

    def _add(self, node: Node) -> Linear:
        first, second = node.args
        if isinstance(first, Tensor):
            first, second = second, first
        operand = self._graph.node(second)
        if operand is not None and operand.op == "onnx.Cast" and operand.options["to"] == _FLOAT:
            stored = operand["input"]
            second = stored if self._stored(stored).widened else second
        if isinstance(second, Tensor):
            return with_bias(self.linear(first), self._stored(second))
        return added(self.linear(first), self.linear(second))

    def _mul(self, node: Node) -> Linear:
        first, second = node.args
        if isinstance(first, Tensor):
            first, second = second, first
        factor = self._number(second)
        if factor is None:
            raise NotLinearError(f"no linear map by stored weights: {node.line}")
        return scaled(self.linear(first), factor)

    def _experts(self, node: Node) -> Linear:
        """One layer for each expert, on its own rows."""
        self._of_experts = True
        return expert_linear(self._graph, node, self.linear)

    def _part(self, node: Node) -> Linear:
        """One layer of several that one operator computes."""
        sizes = self._value(node.get("split"))
        if node.options.get("axis", 0) != -1 or sizes is None:
            raise NotLinearError(f"no linear map by stored weights: {node.line}")
        return part_of(self.linear(node["input"]), sizes, node.output)

    def _matmul(self, node: Node) -> Linear:
        x, weight = node.args
        operand = self._graph.node(weight)
        if operand is not None and operand.op == "onnx.DequantizeLinear":
            return self._blocks(x, operand)
        if operand is not None and operand.op == "onnx.Transpose":
            stored = self._stored(operand["data"])
            if operand.options.get("perm", (1, 0)) != (1, 0) or len(stored.shape) != 2:
                raise NotLinearError(f"the operand is not a transposed matrix: {operand.line}")
            transposed = StoredTensor(
                stored.name, stored.dtype, stored.shape[::-1], lambda: stored.read().T
            )
        else:
            transposed = self._stored(weight)
        made, n = dequantize.correction(transposed, self._roundings), transposed.shape[1]
        below = self._graph.node(x)
        if below is not None and below.op == "onnx.MatMul":
            return composed(self.linear(x), n, made)
        return applied(self.reading(x), n, made)

    def _gemm(self, node: Node) -> Linear:
        """A product with a stored matrix and what is added to it, as tools write MatMul and Add."""
        plain = all(node.options.get(name, 1.0) == 1 for name in ("alpha", "beta"))
        if not plain or node.options.get("transA", 0) or node.options.get("transB", 0):
            raise NotLinearError(f"no linear map by stored weights: {node.line}")
        x, weight, *rest = node.args
        product = dataclasses.replace(node, op="onnx.MatMul", args=(x, weight), options={})
        found = self._matmul(product)
        for operand in rest:
            if isinstance(operand, Tensor):
                found = with_bias(found, self._stored(operand))
            elif operand is not None:
                found = added(found, self.linear(operand))
        return found

    def _blocks(self, x: Any, node: Node) -> Linear:
        packed, scale = self._stored(node["x"]), self._stored(node["x_scale"])
        zero_point = node.get("x_zero_point")
        zero = None if zero_point is None else self._stored(zero_point)
        block_size = int(node.options.get("block_size", 0))
        if node.options.get("axis", 1) != 0 or block_size < 1 or packed.dtype not in _BITS:
            raise NotLinearError(f"no blocked DequantizeLinear of [K, N]: {node.line}")
        if zero is not None and zero.dtype != packed.dtype:
            raise NotLinearError(f"zero-points are {zero.dtype}, codes {packed.dtype}")
        k, n = packed.shape
        if scale.shape != (-(-k // block_size), n):
            raise NotLinearError(f"scales are {list(scale.shape)} for codes {list(packed.shape)}")
        part = dequantize.blocks(packed, scale, zero, _BITS[packed.dtype], block_size, k)
        return applied(self.reading(x), n, part)

    def _nbits(self, node: Node) -> Linear:
        packed, scale = self._stored(node["B"]), self._stored(node["scales"])
        zero_point, bias = node.get("zero_points"), node.get("bias")
        zero = None if zero_point is None else self._stored(zero_point)
        if node.get("g_idx") is not None:
            raise NotLinearError(f"the columns are permuted: {node.line}")
        bits, block_size = int(node.options.get("bits", 4)), int(node.options["block_size"])
        reading = self.reading(node["A"])
        _check_sizes(node, packed, reading.width, block_size, bits)
        part = dequantize.nbits(reading, packed, scale, zero, bits, block_size)
        notes = activations(node.options.get("accuracy_level", 0))
        linear = applied(reading, packed.shape[0], part, notes=notes)
        return linear if bias is None else with_bias(linear, self._stored(bias))

    def _group_quant(self, node: Node) -> Linear:
        packed, scale, zero = (self._stored(node[n]) for n in ("codes", "scale", "zero_point"))
        bits, group_size = int(node.options["bits"]), int(node.options["group_size"])
        reading = self.reading(node["x"])
        _check_sizes(node, packed, reading.width, group_size, bits)
        part = dequantize.group_quant(packed, scale, zero, bits, group_size)
        notes = digits_of(node.options.get("compute", "fp32"))
        return applied(reading, packed.shape[0], part, notes=notes)

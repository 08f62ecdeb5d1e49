"""Sites of programs as linear maps: at every stage from quantized to legalized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from qalora_compile.verify.proof.graphs.graph import Graph, Node, SiteRow, Tensor
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.weights import dequantize
from qalora_compile.verify.proof.weights.linear_map import (
    INT8,
    THREE_DIGITS,
    TWO_DIGITS,
    Linear,
    NotLinearError,
    Reading,
    Rows,
    added,
    applied,
    group_sums,
    identity,
    looked_up,
    pad_groups,
    padded,
    part_of,
    scaled,
    side_by_side,
    with_bias,
)

_UNROUNDED_STAGES = ("quantized", "adapted")
_DIGITS = {"fp32": THREE_DIGITS, "int16": TWO_DIGITS, "int8": INT8}
_AFFINE = ("qweight", "scale", "offset", "lora_A", "lora_B", "gain")
_INT8_LEVEL = 4
"""The accuracy level at which MatMulNBits runs on int8 activations."""


def fx_linear(graph: Graph, site: SiteRow) -> Linear:
    """The linear map that the nodes of a site compute.

    Raises:
        NotLinearError: they do not have the form that a pass of this package produces.
    """
    value = graph.nodes.get(graph.site_values.get(site.name, ""))
    if value is None:
        raise NotLinearError("no node computes the site")
    return _Reader(graph, site).linear(value)


class _Reader:
    """Reads one site."""

    def __init__(self, graph: Graph, site: SiteRow) -> None:
        self._graph, self._site = graph, site
        self._readers: dict[str, Callable[[Node], Linear]] = {
            "aten.add.Tensor": self._add,
            "aten.matmul.default": self._matmul,
            "qalora.group_linear.default": self._group_linear,
            "qalora.integer_zero_linear.default": self._integer_zero_linear,
            "qalora.affine_linear.default": self._affine_linear,
            "qalora.expert_linear.default": self._expert_linear,
            "qalora.pooled_adapter.default": self._pooled_adapter,
            "qalora.expert_adapter.default": self._pooled_adapter,
            "_operator.getitem": self._part,
            "qalora.matmul_nbits.default": self._nbits,
            "qalora.expert_matmul_nbits.default": self._expert_nbits,
            "qalora.group_quant_linear.default": self._group_quant,
            "qalora.expert_group_quant_linear.default": self._expert_group_quant,
            "qalora.matmul_blocks.default": self._blocks,
            "qalora.group_embedding.default": self._group_embedding,
            "qalora.block_embedding.default": self._block_embedding,
            "qalora.flat_embedding.default": self._flat_embedding,
            "qalora.expert_matmul_blocks.default": self._expert_blocks,
        }

    def linear(self, operand: Any) -> Linear:
        """A computed value as a linear map."""
        node = operand if isinstance(operand, Node) else self._graph.node(operand)
        if node is None or node.op not in self._readers:
            shown = node.line if node is not None else self._graph.line(operand)
            raise NotLinearError(f"no linear map by stored weights: {shown}")
        return self._readers[node.op](node)

    def reading(self, operand: Any, group_offsets: Any = None) -> Reading:
        """The value that a layer reads, as a reading of the site's input."""
        node = self._graph.node(operand)
        if node is not None and node.op == "qalora.group_sum.default":
            return group_sums(self.reading(node["x"], group_offsets), node["group_size"])
        if node is not None and node.op == "qalora.pad_groups.default":
            inner = self.reading(node["x"], group_offsets)
            return pad_groups(inner, node["group_size"], node["width"])
        if node is not None and node.op == "aten.dropout.default" and node["train"] is False:
            return self.reading(node["input"], group_offsets)
        if node is not None and self._joins_sums(node):
            return side_by_side([self.reading(part, group_offsets) for part in node["tensors"]])
        if node is not None and self._pads(node):
            _, operand = node["pad"]
            return padded(self.reading(node["self"], group_offsets), operand)
        source = (operand,) if group_offsets is None else (operand, group_offsets)
        return identity(source, self._site.k)

    def _joins_sums(self, node: Node) -> bool:
        """Whether a node concatenates x and its group-sums, for a correction in digits."""
        if node.op != "aten.cat.default" or node.get("dim", 0) != -1:
            return False
        _, *operand = node["tensors"]
        return all(map(self._is_sum, operand))

    def _is_sum(self, operand: Any) -> bool:
        node = self._graph.node(operand)
        if node is not None and self._pads(node):
            node = self._graph.node(node["self"])
        return node is not None and node.op == "qalora.group_sum.default"

    @staticmethod
    def _pads(node: Node) -> bool:
        if node.op != "aten.constant_pad_nd.default" or node.get("value", 0):
            return False
        pad = node["pad"]
        return len(pad) == 2 and pad[0] == 0

    def _stored(self, operand: Any) -> StoredTensor:
        if not isinstance(operand, Tensor):
            raise NotLinearError(f"an operand is computed: {self._graph.line(operand)}")
        return self._graph.tensors[operand.name]

    def _three(self, operands: Iterable[Any]) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
        """Codes, scale and zero-point."""
        codes, scale, zero_point = map(self._stored, operands)
        return codes, scale, zero_point

    def _bias(self, linear: Linear, operand: Any) -> Linear:
        return linear if operand is None else with_bias(linear, self._vector(operand))

    def _vector(self, operand: Any) -> StoredTensor:
        """A stored vector, possibly widened or sliced.

        Packed attention has one bias for several layers.
        """
        item = self._graph.node(operand)
        if item is not None and item.op == "aten.to.dtype" and item["dtype"] == "float32":
            owner = self._stored(item["self"])
            if owner.widened:
                return owner
        if item is None or item.op != "_operator.getitem":
            return self._stored(operand)
        split, index = self._graph.node(item["a"]), item["b"]
        if split is None or split.op != "aten.split_with_sizes.default" or split.get("dim", 0):
            return self._stored(operand)
        owner, sizes = self._stored(split["self"]), split["split_sizes"]
        begin = sum(sizes[:index])
        part = slice(begin, begin + sizes[index])
        name = f"{owner.name}[{part.start}:{part.stop}]"
        return StoredTensor(name, owner.dtype, (sizes[index],), lambda: owner.read()[part])

    def _add(self, node: Node) -> Linear:
        first, second, factor = *node.args, float(node.options.get("alpha", 1))
        if factor != 1:
            return added(self.linear(first), scaled(self.linear(second), factor))
        if isinstance(first, Tensor):
            first, second = second, first
        operand = self._graph.node(second)
        if operand is None or operand.op not in self._readers or self._is_stored_part(operand):
            return with_bias(self.linear(first), self._vector(second))
        return added(self.linear(first), self.linear(second))

    def _is_stored_part(self, node: Node) -> bool:
        """Whether a node takes a part of a stored vector, as `_vector` reads it."""
        split = self._graph.node(node["a"]) if node.op == "_operator.getitem" else None
        return split is not None and isinstance(split.get("self"), Tensor)

    def _matmul(self, node: Node) -> Linear:
        stored = self._stored(node["other"])
        reading = self.reading(node["self"])
        return applied(reading, stored.shape[1], dequantize.correction(stored))

    def _part(self, node: Node) -> Linear:
        """One layer of several that one operator computes."""
        split, index = self._graph.node(node["a"]), node["b"]
        splits = split is not None and split.op == "aten.split_with_sizes.default"
        if split is None or not splits or split.get("dim", 0) != -1:
            raise NotLinearError(f"no linear map by stored weights: {node.line}")
        return part_of(self.linear(split["self"]), split["split_sizes"], index)

    def _group_linear(self, node: Node) -> Linear:
        return self._bias(self._on_codes(node, None), node["bias"])

    def _integer_zero_linear(self, node: Node) -> Linear:
        x, *stored, bias, bits, group_size, lora_a, lora_b, scaling, kind = node.args
        packed, scale, offset = self._three(stored)
        lora = self._stored(lora_a), self._stored(lora_b)
        part = dequantize.integer_zero_linear(
            packed, scale, offset, *lora, bits, group_size, self._site.k, scaling, kind
        )
        return self._bias(applied(self.reading(x), packed.shape[0], part), bias)

    def _affine_linear(self, node: Node) -> Linear:
        packed, *rest = (self._stored(node[name]) for name in _AFFINE)
        shift = None if node["shift"] is None else self._stored(node["shift"])
        sizes = node["bits"], node["group_size"], node["pool"], self._site.k
        part = dequantize.affine_linear((packed, *rest), shift, *sizes, float(node["scaling"]))
        return self._bias(applied(self.reading(node["x"]), packed.shape[0], part), node["bias"])

    def _expert_linear(self, node: Node) -> Linear:
        return self._on_codes(node, node["group_offsets"])

    def _on_codes(self, node: Node, group_offsets: Any) -> Linear:
        packed, scale, offset = self._three(node[name] for name in ("qweight", "scale", "offset"))
        experts = packed.shape[0] if len(packed.shape) == 3 else None
        rounded = self._graph.stage not in _UNROUNDED_STAGES
        part = dequantize.on_codes(
            packed, scale, offset, node["bits"], node["group_size"], self._site.k, rounded=rounded
        )
        x = self.reading(node["x"], group_offsets)
        return applied(x, packed.shape[-2], part, experts=experts)

    def _pooled_adapter(self, node: Node) -> Linear:
        lora_a, lora_b = self._stored(node["lora_A"]), self._stored(node["lora_B"])
        experts = lora_b.shape[0] if len(lora_b.shape) == 3 else None
        group_offsets = node["group_offsets"] if experts else None
        part = dequantize.adapter(lora_a, lora_b, float(node["scaling"]))
        return applied(
            self.reading(node["pooled"], group_offsets),
            lora_b.shape[-2],
            part,
            experts=experts,
            terms=lora_b.shape[-1] + 8,
        )

    def _nbits(self, node: Node) -> Linear:
        x, *stored, bias, bits, block_size, level = node.args
        packed, scale, zero = map(self._stored, stored)
        reading = self.reading(x)
        part = dequantize.nbits(reading, packed, scale, zero, bits, block_size)
        return self._bias(applied(reading, packed.shape[0], part, notes=activations(level)), bias)

    def _group_quant(self, node: Node) -> Linear:
        x, *stored, bits, group_size, compute = node.args
        packed, scale, zero = map(self._stored, stored)
        part = dequantize.group_quant(packed, scale, zero, bits, group_size)
        notes = digits_of(compute)
        return applied(self.reading(x), packed.shape[0], part, notes=notes)

    def _blocks(self, node: Node) -> Linear:
        x, *stored, bits, block_size = node.args
        packed, scale, zero = map(self._stored, stored)
        reading = self.reading(x)
        part = dequantize.blocks(packed, scale, zero, bits, block_size, reading.width)
        return applied(reading, scale.shape[1], part)

    def _group_embedding(self, node: Node) -> Linear:
        ids, *stored, _, bits, group_size, k = node.args
        packed, scale, offset = self._three(stored)
        rounded = self._graph.stage not in _UNROUNDED_STAGES
        part = dequantize.on_codes(packed, scale, offset, bits, group_size, k, rounded=rounded)
        return looked_up((ids,), packed.shape[0], k, part)

    def _block_embedding(self, node: Node) -> Linear:
        ids, *stored, bits, block_size, k = node.args
        packed, scale, zero = self._three(stored)
        if zero.dtype == "uint8":
            part = dequantize.nbits(identity((ids,), k), packed, scale, zero, bits, block_size)
        else:
            part = dequantize.group_quant(packed, scale, zero, bits, block_size)
        return looked_up((ids,), packed.shape[0], k, part)

    def _flat_embedding(self, node: Node) -> Linear:
        ids, *stored, bits, block_size, k = node.args
        packed, scale, zero = self._three(stored)
        part = dequantize.blocks(packed, scale, zero, bits, block_size, k)
        return looked_up((ids,), scale.shape[1], k, part)

    def _expert_nbits(self, node: Node) -> Linear:
        x, sums, *lists, group_offsets, bits, block_size, level = node.args
        reading = self.reading(x, group_offsets)
        made = [
            dequantize.nbits(reading, *self._three(each), bits, block_size)
            for each in zip(*lists[:3], strict=True)
        ]
        n = self._stored(lists[0][0]).shape[0]
        base = applied(reading, n, _by_expert(made), experts=len(made), notes=activations(level))
        return self._corrected(base, sums, lists[3], group_offsets)

    def _expert_group_quant(self, node: Node) -> Linear:
        x, *lists, group_offsets, bits, group_size, compute = node.args
        made = [
            dequantize.group_quant(*self._three(each), bits, group_size)
            for each in zip(*lists, strict=True)
        ]
        n, notes = self._stored(lists[0][0]).shape[0], digits_of(compute)
        reading = self.reading(x, group_offsets)
        return applied(reading, n, _by_expert(made), experts=len(made), notes=notes)

    def _expert_blocks(self, node: Node) -> Linear:
        x, sums, *lists, group_offsets, bits, block_size = node.args
        reading = self.reading(x, group_offsets)
        made = [
            dequantize.blocks(*self._three(each), bits, block_size, reading.width)
            for each in zip(*lists[:3], strict=True)
        ]
        n = self._stored(lists[1][0]).shape[1]
        base = applied(reading, n, _by_expert(made), experts=len(made))
        return self._corrected(base, sums, lists[3], group_offsets)

    def _corrected(self, base: Linear, sums: Any, stored: Any, group_offsets: Any) -> Linear:
        if sums is None:
            return base
        made = [dequantize.correction(self._stored(c)) for c in stored]
        reading = self.reading(sums, group_offsets)
        return added(base, applied(reading, base.n, _by_expert(made), experts=len(made)))


def digits_of(compute: str) -> tuple[str, ...]:
    """The note on a GroupQuantLinear with this attribute, which splits its input into digits."""
    return (_DIGITS[compute],)


def activations(level: int) -> tuple[str, ...]:
    """The note on a MatMulNBits of this accuracy level, which may round its input at run time."""
    return (INT8,) if level == _INT8_LEVEL else ()


def _by_expert(parts: list[dequantize.Part]) -> dequantize.Part:
    def rows(part: slice, expert: int) -> Rows:
        return parts[expert](part, -1)

    return rows

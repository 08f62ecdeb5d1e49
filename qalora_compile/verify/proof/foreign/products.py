"""Products with stored matrices, and lookups in stored tables, in graphs that name no layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Ref, Tensor, reachable
from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor, from_array
from qalora_compile.verify.proof.weights import dequantize
from qalora_compile.verify.proof.weights.linear_map import identity

NBITS, LOOKUP = "com.microsoft.MatMulNBits", "com.microsoft.GatherBlockQuantized"
HEAD = 16
"""How many rows are compared first; a single one may be of a token that is never used."""
_MATRIX = 2


@dataclass(frozen=True)
class Product:
    """x Wᵀ of a stored W `[n, k]`, or rows of W by number.

    Attributes:
        value: The value that a node computes from it.
        name: The stored tensor.
        x: The operand.
        rows: Some rows of W, in float64.
        bias: The operand that the same node adds; None for none.
        coded: Whether W is stored as codes.
        lookup: Whether rows are looked up.
    """

    value: str
    name: str
    x: Any
    n: int
    k: int
    rows: Callable[[slice], Array]
    bias: Any = None
    coded: bool = False
    lookup: bool = False

    @cached_property
    def head(self) -> Array:
        """The first rows, at most `HEAD` of them: by these the others are told apart."""
        return self.rows(slice(0, min(self.n, HEAD)))


def products_of(graph: Graph, *, lookups: bool) -> list[Product]:
    """Those that outputs of a graph depend on, in its order; with lookups if they are wanted."""
    read = _of_fx if graph.dialect == FX else _of_onnx
    needed = reachable(graph, list(graph.outputs.values()), frozenset())
    found = (read(graph, node) for name, node in graph.nodes.items() if name in needed)
    kept = [one for one in found if one is not None and (lookups or not one.lookup)]
    return [_with_bias(graph, one) for one in kept]


def _with_bias(graph: Graph, product: Product) -> Product:
    """With the stored vector that the only reader of an ONNX product adds to it."""
    if graph.dialect == FX or product.bias is not None:
        return product
    value = Ref(product.value)
    readers = [node for node in graph.nodes.values() if value in node.args]
    if len(readers) != 1 or readers[0].op != "onnx.Add" or value in graph.outputs.values():
        return product
    (bias,) = [arg for arg in readers[0].args if arg != value] or [None]
    fits = isinstance(bias, Tensor) and graph.tensors[bias.name].shape == (product.n,)
    return dataclasses.replace(product, value=readers[0].name, bias=bias) if fits else product


def _plain(stored: StoredTensor, *, turned: bool) -> Callable[[slice], Array]:
    """Rows of a stored `[n, k]`, or columns of a `[k, n]`."""

    def rows(part: slice) -> Array:
        values = stored.values()
        return np.asarray(values[:, part].T if turned else values[part], np.float64)

    return rows


def _matrix(graph: Graph, operand: Any) -> tuple[StoredTensor, bool] | None:
    """A stored matrix, and whether it is transposed."""
    node = graph.node(operand)
    if node is not None and node.op == "onnx.Transpose":
        inner = _matrix(graph, node["data"])
        plain = node.options.get("perm", (1, 0)) == (1, 0)
        return None if inner is None or not plain else (inner[0], not inner[1])
    if not isinstance(operand, Tensor):
        return None
    stored = graph.tensors[operand.name]
    fits = len(stored.shape) == _MATRIX and stored.dtype in ("float32", "float16", "bfloat16")
    return (stored, False) if fits else None


def _product(
    graph: Graph, node: Node, x: Any, weight: Any, bias: Any, *, turned: bool
) -> Product | None:
    """With W as stored `[n, k]`, or as `[k, n]` if it is `turned`."""
    found = _matrix(graph, weight)
    if found is None:
        return None
    stored, flipped = found
    across = turned != flipped
    n, k = stored.shape[::-1] if across else stored.shape
    rows = _plain(stored, turned=across)
    return Product(node.name, stored.name, x, n, k, rows, bias)


def _of_fx(graph: Graph, node: Node) -> Product | None:
    if node.op == "aten.linear.default":
        x, weight, *bias = node.args
        return _product(graph, node, x, weight, bias[0] if bias else None, turned=False)
    if node.op == "aten.addmm.default" and not node.options:
        bias, x, weight = node.args
        return _product(graph, node, x, weight, bias, turned=True)
    if node.op == "aten.embedding.default":
        weight, ids, *_ = node.args
        made = _product(graph, node, ids, weight, None, turned=False)
        return None if made is None else dataclasses.replace(made, lookup=True)
    return None


def _of_onnx(graph: Graph, node: Node) -> Product | None:
    if node.op == "onnx.MatMul":
        x, weight = node.args
        return _product(graph, node, x, weight, None, turned=True)
    if node.op == "onnx.Gemm":
        x, weight, *bias = node.args
        if any(node.options.get(n, 1.0) != 1 for n in ("alpha", "beta")) or node.options.get(
            "transA", 0
        ):
            return None
        turned = not node.options.get("transB", 0)
        return _product(graph, node, x, weight, bias[0] if bias else None, turned=turned)
    if node.op == NBITS:
        return _of_codes(graph, node)
    return _looked_up(graph, node) if node.op == LOOKUP else None


def _stored(graph: Graph, operand: Any) -> StoredTensor | None:
    """A stored tensor, possibly behind a Reshape."""
    node = graph.node(operand)
    if node is not None and node.op == "onnx.Reshape":
        operand = node["data"]
    return graph.tensors[operand.name] if isinstance(operand, Tensor) else None


def _of_codes(graph: Graph, node: Node) -> Product | None:
    bits, block = int(node.options.get("bits", 4)), int(node.options["block_size"])
    packed, scale = (_stored(graph, node[name]) for name in ("B", "scales"))
    prepacked = node.options.get("weight_prepacked", 0)
    if packed is None or scale is None or node.get("g_idx") is not None or prepacked:
        return None
    operand = node.get("zero_points")
    zero = None if operand is None else _stored(graph, operand)
    if operand is not None and zero is None:
        return None
    n, k = int(node.options["N"]), int(node.options["K"])
    parts = (packed, scale, zero)
    return _coded(node, node["A"], parts, (n, k), (bits, block), node.get("bias"))


def _looked_up(graph: Graph, node: Node) -> Product | None:
    bits, block = int(node.options.get("bits", 4)), int(node.options.get("block_size", 128))
    data, ids, scales, *rest = node.args
    packed, scale = (_stored(graph, operand) for operand in (data, scales))
    zero = _stored(graph, rest[0]) if rest and rest[0] is not None else None
    plain = node.options.get("gather_axis", 0) == 0 and node.options.get("quantize_axis", 1) == 1
    if packed is None or scale is None or not plain or packed.dtype != "uint8":
        return None
    n = packed.shape[0]
    k = packed.size // n * 8 // bits
    made = _coded(node, ids, (packed, scale, zero), (n, k), (bits, block), None)
    return dataclasses.replace(made, lookup=True)


def _coded(
    node: Node,
    x: Any,
    parts: tuple[StoredTensor, StoredTensor, StoredTensor | None],
    sizes: tuple[int, int],
    form: tuple[int, int],
    bias: Any,
) -> Product:
    packed, scale, zero = parts
    (n, k), (bits, block) = sizes, form
    shape = (n, -(-k // block), block * bits // 8)
    codes = dataclasses.replace(
        packed, shape=shape, read=lambda: np.asarray(packed.read()).reshape(shape)
    )
    part = dequantize.nbits(identity((x,), k), codes, scale, zero, bits, block)

    def rows(taken: slice) -> Array:
        return part(taken, -1).weight

    return Product(node.name, packed.name, x, n, k, rows, bias, coded=True)


def cut_into(graph: Graph, product: Product, sizes: Sequence[int]) -> list[str]:
    """The values of a product's parts, one behind the other, each before its share of the bias.

    The parts are nodes of `graph` afterwards. A product of one part without a bias is its own.
    """
    if len(sizes) == 1 and product.bias is None:
        return [product.value]
    old = graph.nodes[product.value]
    names = [f"{product.value}, part {i}" for i in range(len(sizes))]
    op, read = "a part of a product", (product.x,)
    made = [Node(name, op, read, {}, old.line, path=old.path) for name in names]
    joined: list[Any] = [Ref(name) for name in names]
    if product.bias is not None:
        add = "aten.add.Tensor" if graph.dialect == FX else "onnx.Add"
        last = [product.value] if len(sizes) == 1 else [f"{name}, with bias" for name in names]
        terms = zip(joined, _bias_parts(graph, product.bias, sizes), strict=True)
        made += [Node(n, add, both, {}, old.line) for n, both in zip(last, terms, strict=True)]
        joined = [Ref(name) for name in last]
    if len(sizes) > 1:
        made.append(Node(product.value, "onnx.Concat", tuple(joined), {"axis": -1}, old.line))
    graph.nodes = dict(_replaced(graph.nodes, product.value, made))
    return names


def _bias_parts(graph: Graph, bias: Any, sizes: Sequence[int]) -> list[Any]:
    if len(sizes) == 1:
        return [bias]
    values, parts = graph.tensors[bias.name].values(), []
    for place, size in enumerate(sizes):
        name = f"{bias.name}, part {place}"
        begin = sum(sizes[:place])
        graph.tensors[name] = from_array(name, values[begin : begin + size])
        parts.append(Tensor(name))
    return parts


def _replaced(nodes: dict[str, Node], old: str, made: list[Node]) -> Iterator[tuple[str, Node]]:
    for name, node in nodes.items():
        if name == old:
            yield from ((one.name, one) for one in made)
        else:
            yield name, node

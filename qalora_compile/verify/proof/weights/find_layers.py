"""Finds the layers of a file whose values a tool has renamed or fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from qalora_compile.verify.proof.graphs.graph import Graph, Node, SiteRow, Tensor
from qalora_compile.verify.proof.weights.linear_map import NotLinearError
from qalora_compile.verify.proof.weights.onnx_layers import GROUP_QUANT, NBITS, onnx_linear

PRODUCTS = ("onnx.Gemm", "onnx.MatMul", NBITS, GROUP_QUANT)
"""Operators that multiply by a stored matrix."""
_ENDS = ("onnx.Add", *PRODUCTS)
"""Operators with which a layer may end in a file that a tool rewrote."""

_INSIDE = (*_ENDS, "onnx.DequantizeLinear", "onnx.Transpose", "onnx.Split")
"""Operators inside of a layer."""


def find_layers(graph: Graph) -> Graph:
    """Assign layers whose value a tool renamed or fused the last value of their own tensors.

    Lookups have no stated value: `find_lookups` finds them. Returns `graph`. A wrong guess is no
    harm: its map is compared like any other.
    """
    for name, stated in list(graph.site_values.items()):
        site = graph.sites.get(name)
        if site is None or stated in graph.nodes or site.experts is not None:
            continue
        found = stated
        for value in _candidates(graph, site):
            graph.site_values[name] = value
            with suppress(NotLinearError, KeyError, ValueError, TypeError, IndexError):
                if onnx_linear(graph, site).n == site.n:
                    found = value
        graph.site_values[name] = found
    return graph


def _candidates(graph: Graph, site: SiteRow) -> Iterator[str]:
    """Values whose node, or one close before it, holds a tensor of the site."""
    own = f"{site.path}."
    for value, node in graph.nodes.items():
        inside = [node, *below(graph, node)] if node.op in _ENDS else []
        inside += [made for one in inside[1:] for made in below(graph, one)]
        if any(part.startswith(own) for one in inside for part in held(one)):
            yield value


def below(graph: Graph, node: Node) -> list[Node]:
    """The nodes of a layer that a node reads."""
    return [n for n in map(graph.node, node.args) if n is not None and n.op in _INSIDE]


def held(node: Node) -> list[str]:
    """Names of the stored tensors that a node reads."""
    return [arg.name for arg in node.args if isinstance(arg, Tensor)]

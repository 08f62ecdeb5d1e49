"""Finds the layers of a file whose values a tool has renamed or fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from qalora_compile.verify.proof.graphs.graph import Graph, SiteRow, Tensor
from qalora_compile.verify.proof.weights.linear_map import NotLinearError
from qalora_compile.verify.proof.weights.onnx_layers import NBITS, onnx_linear

_ENDS = ("onnx.Add", "onnx.Gemm", "onnx.MatMul", NBITS)
"""Operators with which a layer may end in a file that a tool rewrote."""


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
    """Values whose node, or one that it reads, holds a tensor of the site."""
    own = f"{site.path}."
    for value, node in graph.nodes.items():
        read = [node, *(n for n in map(graph.node, node.args) if n is not None)]
        stored = [arg.name for one in read for arg in one.args if isinstance(arg, Tensor)]
        if node.op in _ENDS and any(part.startswith(own) for part in stored):
            yield value

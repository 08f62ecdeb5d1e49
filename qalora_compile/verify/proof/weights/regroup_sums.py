"""Brings the summands of a layer together where a tool grouped sums in another way.

(W x + b) + r and W x + (b + r) are equal, but only the first holds the layer's value. Sums of a
rewritten file are regrouped in the graph that is proved: first the layer's products, corrections
and bias, then the rest. The bias that ONNX Runtime's fusions add is a summand as well.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qalora_compile.verify.proof.graphs.graph import ONNX, Graph, Node, Ref, Tensor, refs, text_of
from qalora_compile.verify.proof.weights.find_layers import PRODUCTS, below, held

_ADD = "onnx.Add"
_BIASED = {
    "com.microsoft.BiasGelu": ("com.microsoft.Gelu", 1),
    "com.microsoft.FastGelu": ("com.microsoft.FastGelu", 1),
    "com.microsoft.SkipLayerNormalization": ("com.microsoft.SkipLayerNormalization", 4),
}
"""Operators that add a bias: the operator without it, and which operand the bias is."""


def regroup_sums(graph: Graph) -> None:
    """Give each layer whose summands are spread over a sum a node that computes its value.

    Nodes that the file does not have can be proved, but not run.
    """
    if graph.dialect == ONNX:
        _Sums(graph).regroup()


class _Sums:
    """The sums of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        paths = Counter(site.path for site in graph.sites.values())
        self._sites = {s.path: n for n, s in graph.sites.items() if paths[s.path] == 1}
        self._values = {graph.site_values[n]: n for n in self._sites.values()}

    def regroup(self) -> None:
        """Regroup all sums."""
        nodes: dict[str, Node] = {}
        for node in self._graph.nodes.values():
            for made in self._without_bias(node):
                nodes[made.name] = made
        self._graph.nodes = nodes
        given = tuple(self._graph.outputs.values())
        read = Counter(r.name for node in nodes.values() for r in refs((*node.args, node.options)))
        read += Counter(r.name for r in refs(given))
        adds = {n.name for n in nodes.values() if n.op == _ADD}
        summands = {r.name for name in adds for r in refs(nodes[name].args)}
        inner = {name for name in adds & summands if read[name] == 1}
        inner -= self._values.keys()
        for node in [n for n in nodes.values() if n.op == _ADD and n.name not in inner]:
            self._regroup(node, list(self._leaves(node, inner)))

    def _without_bias(self, node: Node) -> Iterator[Node]:
        """A node, or the sum with its bias and the node without it."""
        op, place = _BIASED.get(node.op, ("", 0))
        operands = list(node.args)
        bias = operands.pop(place) if op and place < len(operands) else None
        if bias is None:
            yield node
            return
        owned = [self._owner(operand) == self._owner(bias) for operand in operands]
        at = 1 if owned[:2] == [False, True] else 0
        name = f"{text_of(operands[at])[1:]}, with {bias.name}"
        yield from _sum(name, [operands[at], bias])
        operands[at] = Ref(name)
        yield dataclasses.replace(node, op=op, args=tuple(operands))

    def _leaves(self, node: Node, inner: set[str]) -> Iterator[Any]:
        """The summands of a sum, in order."""
        for operand in node.args:
            if isinstance(operand, Ref) and operand.name in inner:
                yield from self._leaves(self._graph.nodes[operand.name], inner)
            else:
                yield operand

    def _owner(self, operand: Any) -> str | None:
        """The layer that a summand is a part of."""
        if isinstance(operand, Tensor):
            return self._path_of(operand.name)
        if isinstance(operand, Ref) and operand.name in self._values:
            return self._values[operand.name]
        node = self._graph.node(operand)
        if node is None or node.op not in PRODUCTS:
            return None
        stored = [name for one in (node, *below(self._graph, node)) for name in held(one)]
        return next((o for o in map(self._path_of, stored) if o is not None), None)

    def _path_of(self, tensor: str) -> str | None:
        return self._sites.get(tensor.rpartition(".")[0])

    def _regroup(self, root: Node, leaves: list[Any]) -> None:
        owners = list(map(self._owner, leaves))
        if self._values.get(root.name, owners[0]) not in owners:
            return  # the file calls this the value of a layer that is no part of it
        made, rest = list[Node](), list[Any]()
        computed = {o for o, leaf in zip(owners, leaves, strict=True) if isinstance(leaf, Ref)}
        for owner in dict.fromkeys(owners):
            own = [leaf for o, leaf in zip(owners, leaves, strict=True) if o == owner]
            stated = owner is not None and [Ref(self._graph.site_values[owner])] == own
            if owner is None or owner not in computed or len(own) < 2 or stated:
                rest += own
                continue
            made += _sum(f"{owner}, regrouped", own)
            rest.append(Ref(made[-1].name))
            self._graph.site_values[owner] = root.name if len(own) == len(leaves) else made[-1].name
        if not made or len(rest) == 1:
            return
        *before, last = _sum(root.name, rest)
        nodes = list(self._graph.nodes.values())
        place = nodes.index(root)
        nodes[place : place + 1] = [*made, *before, dataclasses.replace(root, args=last.args)]
        self._graph.nodes = {node.name: node for node in nodes}


def _sum(name: str, operands: list[Any]) -> list[Node]:
    """A sum as a chain of operators of two operands, of which the last has this name."""
    made, total = list[Node](), operands[0]
    for count, operand in enumerate(operands[1:], 2):
        value = name if count == len(operands) else f"{name}, {count} summands"
        line = f"{value} = {_ADD}({text_of(total)}, {text_of(operand)})"
        made.append(Node(value, _ADD, (total, operand), {}, line))
        total = Ref(value)
    return made

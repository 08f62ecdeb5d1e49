"""Recover the layers of a captured model from its graph, and checkpoint them one by one.

The nodes of a graph are in topological order, so it can be cut between any two nodes. The names of
parameters identify a layer: `model.layers.3.…` belongs to `model.layers.3`. Between the last node
that reads a parameter of one layer and the first that reads one of the next, the graph is cut where
the fewest values cross.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.module import ProgramModule, build_module, program_tensors
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.subgraph import extract_subgraph
from qalora_compile.ir.torch_internals import share_call_tree

_LAYER = re.compile(r"((?:.*?\.)?\d+)\.")
_STORED = ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        layer: Module path of the layer that they compute; None before the first and after the last.
        nodes: The nodes in graph order, without those that read a stored tensor.
    """

    layer: str | None
    nodes: tuple[fx.Node, ...]


class Checkpointed(nn.Module):
    """Recomputes a part of a model in the backward pass instead of keeping its activations."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *values: Any) -> Any:
        """Compute the part's outputs."""
        if not torch.is_grad_enabled():
            return self.part(*values)
        return checkpoint(self.part, *values, use_reentrant=False)


def split_layers(graph: fx.Graph) -> list[Segment]:
    """Cut the graph into a prefix, one segment per layer, and a suffix.

    Layers that share all their parameters are one. Values that several layers read, such as rotary
    tables, belong to the segment that computes them first.
    """
    nodes = [node for node in graph.nodes if node.op not in _STORED]
    places = {node: place for place, node in enumerate(nodes)}
    crossing = _crossings(nodes, places)
    cuts: list[int] = [0]
    names: list[str | None] = [None]
    known: set[str] = set()
    last = -1
    for place, node in enumerate(nodes):
        layers = _layers_of(node)
        if not layers:
            if not known and _reads_tensor(node):
                last = place
            continue
        new = [layer for layer in layers if layer not in known]
        if new:
            cuts.append(_narrowest(crossing, last + 1, place))
            names.append(new[0])
            known.update(new)
        last = place
    if known:
        outside = (p for p in range(last + 1, len(nodes)) if _reads_tensor(nodes[p]))
        cuts.append(_narrowest(crossing, last + 1, next(outside, len(nodes))))
        names.append(None)
    bounds = itertools.pairwise([*cuts, len(nodes)])
    parts = (Segment(name, tuple(nodes[a:b])) for name, (a, b) in zip(names, bounds, strict=True))
    return [part for part in parts if part.nodes]


def checkpoint_graph(module: ProgramModule) -> ProgramModule:
    """An equivalent module with the same tensors that keeps only the inputs of each layer.

    Each layer (`split_layers`) is recomputed in the backward pass, with the same random numbers.

    Raises:
        UnsupportedError: the names of the graph's parameters show no layers.
    """
    segments = split_layers(module.graph)
    if not any(segment.layer for segment in segments):
        raise UnsupportedError(
            "no layers are found in the model: no parameter has a number in its name",
            hint="train it without gradient checkpointing",
        )
    parts = nn.Module()
    outer = fx.Graph()
    share_call_tree(module.graph, outer)
    new: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            new[node] = outer.placeholder(node.name)
    for index, segment in enumerate(segments):
        inputs, outputs = _inputs(segment), _outputs(segment)
        part = extract_subgraph(module, segment.nodes, inputs, tuple(outputs))
        name = f"part_{index}"
        parts.add_module(name, Checkpointed(part) if segment.layer else part)
        call = outer.call_module(name, tuple(new[node] for node in inputs))
        for i, node in enumerate(outputs):
            new[node] = outer.call_function(operator.getitem, (call, i))
    (end,) = (node for node in module.graph.nodes if node.op == "output")
    for node in end.all_input_nodes:
        if node.op == "get_attr":  # an output may be a stored tensor
            new[node] = outer.get_attr(str(node.target))
    outer.output(map_arg(output_value(module.graph), new.__getitem__))
    return build_module(outer, program_tensors(module), submodules=parts, training=module.training)


def _layers_of(node: fx.Node) -> list[str]:
    """The layers whose parameters a node reads."""
    names = (str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
    return [match[1] for match in map(_LAYER.match, names) if match]


def _reads_tensor(node: fx.Node) -> bool:
    return any(n.op == "get_attr" for n in node.all_input_nodes)


def _crossings(nodes: Sequence[fx.Node], places: Mapping[fx.Node, int]) -> list[int]:
    """The number of values that cross each cut; cut i is before node i."""
    changes = [0] * (len(nodes) + 2)
    for place, node in enumerate(nodes):
        last = max((places.get(user, len(nodes)) for user in node.users), default=place)
        changes[place + 1] += 1
        changes[last + 1] -= 1
    return list(itertools.accumulate(changes))[: len(nodes) + 1]


def _narrowest(crossing: Sequence[int], first: int, last: int) -> int:
    """The first of the cuts from `first` to `last` with the fewest crossing values."""
    return min(range(first, last + 1), key=lambda cut: crossing[cut])


def _inputs(segment: Segment) -> list[fx.Node]:
    """The nodes of other segments and the arguments that a segment reads, in order of use."""
    own = set(segment.nodes)
    read = (n for node in segment.nodes for n in node.all_input_nodes if n.op != "get_attr")
    return list(dict.fromkeys(node for node in read if node not in own))


def _outputs(segment: Segment) -> list[fx.Node]:
    """The nodes of a segment that others read, in graph order."""
    own = set(segment.nodes)
    return [node for node in segment.nodes if any(user not in own for user in node.users)]

"""A part of a graph as a module of its own, on the same tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.fx.node import map_arg

from qalora_compile.ir.module import ProgramModule, build_module, program_tensors


def part_of(
    module: ProgramModule,
    nodes: Iterable[fx.Node],
    inputs: Iterable[fx.Node],
    output: fx.Node | tuple[fx.Node, ...],
) -> ProgramModule:
    """What some nodes of a module's graph compute.

    Args:
        module: The whole.
        nodes: In graph order, without those that read a stored tensor.
        inputs: What they read of the rest; the arguments, in this order.
        output: What is returned.
    """
    graph = fx.Graph()
    new = {node: graph.placeholder(node.name) for node in inputs}

    def find(node: fx.Node) -> fx.Node:
        if node not in new:
            assert node.op == "get_attr", "the inputs are complete"
            new[node] = graph.get_attr(str(node.target))
        return new[node]

    for node in nodes:
        new[node] = graph.node_copy(node, find)
    graph.output(map_arg(output, find))
    tensors = program_tensors(module)
    return build_module(graph, tensors, submodules=module, training=module.training)

"""Extraction of a subgraph as a module of its own, on the same tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx
from torch.fx.node import map_arg

from qalora_compile.ir.meta import site_of
from qalora_compile.ir.module import ProgramModule, build_module, program_tensors
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import InputLeaf, Signature, dtype_name
from qalora_compile.ir.site_plan import SitePlan
from qalora_compile.ir.torch_internals import CallTree, pytree, set_call_tree


def extract_subgraph(
    module: ProgramModule,
    nodes: Iterable[fx.Node],
    inputs: Iterable[fx.Node],
    output: fx.Node | tuple[fx.Node, ...],
) -> ProgramModule:
    """The subgraph of some nodes of a module's graph.

    Args:
        module: The complete module.
        nodes: In graph order, without those that read a stored tensor.
        inputs: The other nodes that they read; the arguments, in this order.
        output: The node that is returned.
    """
    graph = _copied({node: node.name for node in inputs}, nodes, output)
    return build_module(graph, program_tensors(module), submodules=module, training=module.training)


def _copied(
    inputs: Mapping[fx.Node, str],
    nodes: Iterable[fx.Node],
    output: fx.Node | tuple[fx.Node, ...],
) -> fx.Graph:
    """A graph of copies of `nodes`; `inputs` become arguments with the given names."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node, name in inputs.items():
        new[node] = graph.placeholder(name)
        new[node].meta.update({k: v for k, v in node.meta.items() if k == "val"})

    def find(node: fx.Node) -> fx.Node:
        if node not in new:
            assert node.op == "get_attr", "the inputs are complete"
            new[node] = graph.get_attr(str(node.target))
        return new[node]

    for node in nodes:
        new[node] = graph.node_copy(node, find)
    graph.output(map_arg(output, find))
    return graph


@dataclass(frozen=True)
class Cut:
    """An input of a subgraph.

    Attributes:
        name: Of the input.
        node: The node of the complete program whose value it takes.
        value: That value.
    """

    name: str
    node: str
    value: Tensor


def cut_subgraph(program: Program, target: str, cuts: Sequence[Cut], output: str) -> Program:
    """The subgraph that computes the node `target` from `cuts`, all of fixed shape.

    Args:
        program: The complete program.
        target: Name of a node.
        cuts: All values that the subgraph reads and neither computes nor stores.
        output: Name of the output.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = {nodes[cut.node]: cut.name for cut in cuts}
    inside = _inside(nodes[target], set(inputs))
    ordered = [node for node in program.graph.nodes if node in inside]
    graph = _copied(inputs, ordered, (nodes[target],))
    names = [cut.name for cut in cuts]
    values = tuple(cut.value for cut in cuts)
    _, in_spec = pytree.tree_flatten((values, {}))
    _, out_spec = pytree.tree_flatten(0)
    set_call_tree(graph, CallTree(names, in_spec, out_spec))
    graph.lint()
    leaves = [InputLeaf(c.name, dtype_name(c.value.dtype), tuple(c.value.shape)) for c in cuts]
    sites = {site_of(node) for node in inside}
    return dataclasses.replace(
        program,
        module=build_module(graph, program.tensors(), submodules=program.module, training=False),
        plan=SitePlan(tuple(row for row in program.plan if row.name in sites)),
        signature=Signature(tuple(leaves), (output,)),
        example=(values, {}),
        notes=(),
    )


def reads(program: Program, target: str, stops: Mapping[str, object]) -> list[str]:
    """The inputs and nodes of `stops` that the subgraph computing `target` reads directly."""
    nodes = {node.name: node for node in program.graph.nodes}
    stopped = {nodes[name] for name in stops if name != target}
    inside = _inside(nodes[target], stopped)
    found = {
        source
        for node in inside
        for source in node.all_input_nodes
        if source in stopped or source.op == "placeholder"
    }
    if nodes[target].op == "placeholder":
        found.add(nodes[target])
    return [node.name for node in program.graph.nodes if node in found]


def _inside(target: fx.Node, stops: set[fx.Node]) -> set[fx.Node]:
    """The nodes that compute `target`, itself included, without `stops` and inputs."""
    found: set[fx.Node] = set()
    waiting = [target]
    while waiting:
        node = waiting.pop()
        if node in found or node in stops or node.op == "placeholder":
            continue
        found.add(node)
        waiting += node.all_input_nodes
    return found

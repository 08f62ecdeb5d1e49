"""Recompute the activations between two quantized layers in the backward pass.

For its backward pass, a quantized layer keeps group sums of its input, not the input. Most of the
memory of a step is then held by attention and activation functions. Their values are cheap to
recompute from the outputs of the preceding layers: queries, keys and values, or the two halves of a
gated network.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx, nn

from qalora_compile.ir.module import (
    ProgramModule,
    build_module,
    copy_graph,
    erase_unread,
    program_tensors,
)
from qalora_compile.ir.ops.views import argument, set_argument
from qalora_compile.ir.spec import ADAPTED_LINEAR, INTEGER_ZERO_LINEAR
from qalora_compile.ir.subgraph import extract_subgraph
from qalora_compile.ir.torch_internals import OpOverload, schema_of
from qalora_compile.training.forward.layer_checkpointing import Checkpointed

_LAYERS = frozenset({ADAPTED_LINEAR, INTEGER_ZERO_LINEAR})


def recompute_activations(module: ProgramModule) -> ProgramModule:
    """An equivalent module with the same tensors that keeps fewer activations.

    For every layer with an adapter, the nodes whose values reach only this layer's input are
    recomputed in the backward pass, with the same random numbers. Values with other uses, such as
    the residual stream and norms that several layers read, are kept as before.
    """
    graph = copy_graph(module.graph)
    order = {node: place for place, node in enumerate(graph.nodes)}
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    for layer in [node for node in graph.nodes if node.target in _LAYERS]:
        x = argument(layer, "x")
        own = private_to(layer, order)
        if not own:
            continue
        nodes = sorted(own, key=order.__getitem__)
        read = (n for node in nodes for n in node.all_input_nodes if n.op != "get_attr")
        inputs = tuple(dict.fromkeys(node for node in read if node not in own))
        name = f"between_{order[layer]}"
        holder.add_module(name, Checkpointed(extract_subgraph(module, nodes, inputs, x)))
        with graph.inserting_before(layer):
            again = graph.call_module(name, inputs)
        set_argument(layer, "x", again)
        erase_unread([x])
    tensors = program_tensors(module)
    return build_module(graph, tensors, submodules=holder, training=module.training)


def private_to(layer: fx.Node, order: Mapping[fx.Node, int]) -> set[fx.Node]:
    """The nodes that contribute only to the input of a layer, back to the outputs of others."""
    own: set[fx.Node] = set()
    waiting: set[fx.Node] = {argument(layer, "x")}
    while waiting:
        node = max(waiting, key=order.__getitem__)
        waiting.remove(node)
        if _can_run_again(node) and all(user in own or user is layer for user in node.users):
            own.add(node)
            waiting.update(n for n in node.all_input_nodes if n.op != "get_attr")
    return own


def _can_run_again(node: fx.Node) -> bool:
    """Whether a node is a pure computation and not a quantized layer."""
    if node.op != "call_function" or node.target in _LAYERS:
        return False
    if node.target is operator.getitem:
        return False  # one of several outputs, which may be a layer's
    return isinstance(node.target, OpOverload) and not schema_of(node.target).is_mutable

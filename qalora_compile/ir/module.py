"""`ProgramModule`: the GraphModule inside a program, with working train and eval modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from qalora_compile.ir.ops.views import argument, set_argument
from qalora_compile.ir.torch_internals import (
    LazyGraphModule,
    is_erased,
    set_arguments,
    share_call_tree,
)

_ATEN = torch.ops.aten
_DROPOUT_P = "qalora_dropout_p"
_MODE_ARGUMENT: dict[object, str] = {
    _ATEN.dropout.default: "train",
    _ATEN.dropout_.default: "train",
    _ATEN.feature_dropout.default: "train",
    _ATEN.alpha_dropout.default: "train",
    _ATEN.batch_norm.default: "training",
    _ATEN.instance_norm.default: "use_input_stats",
    _ATEN.rrelu.default: "training",
}
_SDPA = _ATEN.scaled_dot_product_attention.default
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
"""An operator whose first argument is the kind of a device, as a word."""


class ProgramModule(LazyGraphModule):
    """A GraphModule whose modes and device follow `train()`, `eval()` and `to()`.

    `torch.export` burns the mode into arguments (`dropout(x, p, train)`, the dropout of attention,
    `batch_norm(…, training, …)`), and the device on which a model was captured (`arange(…,
    device=cpu)`); switching the mode, or moving the tensors, rewrites these arguments.

    Python code is made from the graph when the module is first called, not when it is built: most
    modules between two passes are never called.
    """

    def train(self, mode: bool = True) -> ProgramModule:
        """Switch dropout, attention dropout and batch norm to training or evaluation."""
        changed = False
        for node in self.graph.nodes:
            changed |= _set_mode(node, mode)
        if changed and self.is_compiled:
            self.recompile()
        super().train(mode)
        return self

    def after_move(self) -> None:
        """Make the graph create its tensors on the device of the module's tensors."""
        moved = next(chain(self.parameters(), self.buffers()), None)
        if moved is not None:
            self.move_graph(moved.device)

    def move_graph(self, device: torch.device) -> None:
        """Make the graph, and its subgraphs, create tensors on a device."""
        for module in self.modules():
            if not isinstance(module, fx.GraphModule):
                continue
            changed = [_set_device(node, device) for node in module.graph.nodes]
            # A plain GraphModule is compiled when it is made.
            if any(changed) and (not isinstance(module, ProgramModule) or module.is_compiled):
                module.recompile()

    def rebuild(self, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> ProgramModule:
        """A new module with this one's mode from a graph and the tensors that it may read.

        Tensors are shared, not copied; those that no node reads are left out.
        """
        return build_module(graph, tensors, submodules=self, training=self.training)


def build_module(
    graph: fx.Graph, tensors: Mapping[str, Tensor], *, submodules: nn.Module, training: bool
) -> ProgramModule:
    """Make a `ProgramModule` from a graph, its tensors and the subgraphs of `submodules`."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            target = str(node.target)
            root[target] = tensors[target] if target in tensors else _lookup(submodules, target)
    module = ProgramModule(root, graph)
    # GraphModule copies neither the mode nor, from a dict, the kind of a parameter's container.
    nn.Module.train(module, training)
    return module


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, node metadata and call signature included."""
    copied = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copy = copied.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        # Not passed above: create_node would search the arguments for symbolic numbers, at length.
        # Not by assignment: every assignment to an attribute updates the graph's index of nodes.
        args, kwargs = map_arg(node.args, new.__getitem__), map_arg(node.kwargs, new.__getitem__)
        set_arguments(copy, args, kwargs)
        copy.meta.update(node.meta)
        new[node] = copy
    share_call_tree(graph, copied)
    return copied


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nothing reads, and whatever was computed only for them.

    Unlike `Graph.eliminate_dead_code` it leaves all other nodes, which may have effects.
    """
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if not node.users and not is_erased(node) and node.op in ("call_function", "get_attr"):
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def program_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that the graph of `module` reads, by name, in graph order."""
    found: dict[str, Tensor] = {}
    owners = dict(module.named_modules(remove_duplicate=False))
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(owners.get(owner), leaf, None)
            if isinstance(value, Tensor):
                found[str(node.target)] = value
    return found


def _lookup(module: nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _set_mode(node: fx.Node, training: bool) -> bool:
    """Write the mode into one node; True where that changed it."""
    if node.op != "call_function":
        return False
    if node.target is _SDPA:
        return _set_sdpa(node, training)
    name = _MODE_ARGUMENT.get(node.target)
    if name is None or argument(node, name) == training:
        return False
    set_argument(node, name, training)
    return True


def _set_device(node: fx.Node, device: torch.device) -> bool:
    """Write the device into one node; True where that changed it."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    args, kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
    if node.target is _AUTOCAST and torch.amp.is_autocast_available(device.type):
        _, *others = args
        args = (device.type, *others)
    if (args, kwargs) == (node.args, node.kwargs):
        return False
    set_arguments(node, args, kwargs)
    return True


def _set_sdpa(node: fx.Node, training: bool) -> bool:
    """Attention dropout has no mode argument, so p is set to 0 and its value saved for training."""
    current = argument(node, "dropout_p")
    if current:
        node.meta[_DROPOUT_P] = current
    wanted = node.meta.get(_DROPOUT_P, 0.0) if training else 0.0
    if wanted == current:
        return False
    set_argument(node, "dropout_p", wanted)
    return True

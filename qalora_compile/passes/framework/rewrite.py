"""Helpers with which passes edit a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping

from torch import Tensor, fx, nn

from qalora_compile.ir.lazy_tensor import is_lazy, keep_recipe
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import shaped_graph
from qalora_compile.ir.torch_internals import is_erased
from qalora_compile.passes.framework.base import Change, PassResult
from qalora_compile.passes.framework.match import Match, Mismatch, Pattern, match
from qalora_compile.passes.framework.no_ops import changes_nothing


def rewrite_matches(
    program: Program, patterns: tuple[Pattern, ...], rewrite: Callable[[Match], Change]
) -> PassResult:
    """Rewrite every match of one of some patterns, until none is left.

    A remaining anchor at which the last pattern is recognizable is skipped with a reason.

    Args:
        program: It stays unchanged.
        patterns: In the order in which they are tried.
        rewrite: Replaces a match in its graph, so that it does not match again.
    """
    graph = shaped_graph(program)
    changes, skips = [], []
    for node in list(graph.nodes):
        found: Match | Mismatch | None = None
        while not (is_erased(node) or changes_nothing(node)):
            found = match(node, *patterns)
            if isinstance(found, Mismatch):
                break
            changes.append(rewrite(found))
        if isinstance(found, Mismatch) and found.near:
            skips.append(Change(node.name, "left as it is", found.reason, at=found.node.name))
    return PassResult(program.evolve(graph=graph), tuple(changes), tuple(skips))


def item(node: fx.Node, index: int) -> fx.Node:
    """One of several results."""
    return node.graph.call_function(operator.getitem, (node, index))


class TensorNodes:
    """One `get_attr` node for each tensor of a graph, made at the graph's top on first use."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._nodes: dict[str, fx.Node] = {}
        self._last: fx.Node | None = None

    def get(self, target: str) -> fx.Node:
        """The node that reads the tensor `target`."""
        if target not in self._nodes:
            if self._last is None:
                place = self._graph.inserting_before(next(iter(self._graph.nodes)))
            else:
                place = self._graph.inserting_after(self._last)
            with place:
                self._last = self._nodes[target] = self._graph.get_attr(target)
        return self._nodes[target]


def freeze(
    tensors: Mapping[str, Tensor], names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The same tensors as parameters without gradients; the user's model is not changed.

    Args:
        tensors: By name.
        names: Parameters to freeze; None: all.
    """
    made = {
        name: _parameter(tensor.detach(), tensor, trains=False)
        if isinstance(tensor, nn.Parameter) and (names is None or name in names)
        else tensor
        for name, tensor in tensors.items()
    }
    return _keep_ties(tensors, made)


def set_free(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The same tensors, except that those named are copies that take gradients."""
    made = {
        name: _parameter(_copy(tensor), tensor, trains=True) if name in names else tensor
        for name, tensor in tensors.items()
    }
    return _keep_ties(tensors, made)


def _copy(tensor: Tensor) -> Tensor:
    """A copy; a deferred tensor, which has no memory, is returned itself."""
    return tensor.detach() if is_lazy(tensor) else tensor.detach().clone()


def _parameter(values: Tensor, source: Tensor, *, trains: bool) -> Tensor:
    made: Tensor = keep_recipe(source, nn.Parameter(values, requires_grad=trains))
    return made


def _keep_ties(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let names that shared one parameter object share one again."""
    first = {id(before[name]): after[name] for name in reversed(list(before))}
    return {name: first[id(before[name])] for name in after}

"""Node-by-node execution of a graph that watches the values of chosen nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import fx


class WatchingInterpreter(fx.Interpreter):
    """Runs a graph on flat inputs, up to the last node that is watched.

    The value of a node is freed after its last reader, unless it is watched. Subclasses override
    `compute` (how a node gets its value) and `watch` (what is done with a watched value).

    Args:
        module: The graph and its tensors.
        watched: Names of nodes; None watches none and runs to the outputs. Names that the graph
            lacks are ignored.

    Attributes:
        values: The values of the watched nodes, by name.
    """

    def __init__(self, module: fx.GraphModule, watched: Collection[str] | None = None) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}
        self._watched = frozenset(watched or ())
        found = [node for node in module.graph.nodes if node.name in self._watched]
        self._last = found[-1] if found else None
        self._is_over = watched is not None and not found

    def run_leaves(self, leaves: Sequence[Any]) -> Any:
        """Run on flat inputs, in signature order; the flat outputs, or None if it stops earlier."""
        return self.run(*leaves, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; None once the run is over."""
        if self._is_over:
            return None
        value = self.compute(n)
        if n.name in self._watched:
            value = self.watch(n, value)
        self._is_over = n is self._last
        return value

    def compute(self, node: fx.Node) -> Any:
        """The value of a node, from those in `env` that it reads."""
        return super().run_node(node)

    def watch(self, node: fx.Node, value: Any) -> Any:
        """Take the value of a watched node, and return the value that its readers get instead."""
        self.values[node.name] = value
        return value

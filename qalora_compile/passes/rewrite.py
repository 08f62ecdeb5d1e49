"""What several passes need to edit a graph."""

from __future__ import annotations

from torch import fx


class TensorNodes:
    """One `get_attr` node for each tensor of a graph, made at the top on first use."""

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

"""remove-unit-scale: multiplications and divisions by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qalora_compile import Program, extend
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.shape_propagation import shaped_graph

_ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RemoveUnitScale(extend.Pass):
    """Replace `x * 1` and `x / 1` by x.

    Before:  %1 = aten.mul.Tensor(%x, 1.0)
    After:   %x in its place

    Fires on: multiplications, and with `divisions` also divisions, of a tensor by the number one.
    Leaves alone: what changes the dtype (integers times 1.0), and computed factors.
    Exactness: exact.

    Options:
        divisions: Look at divisions, too.
    """

    name: ClassVar[str] = "remove-unit-scale"
    consumes: ClassVar[tuple[str, ...]] = ("float", "annotated", "quantized", "folded")
    produces: ClassVar[str | None] = None

    divisions: bool = True

    def call(self, program: Program) -> extend.PassResult:
        """Remove them in a copy of the graph that knows the dtype of every value."""
        graph, changes = shaped_graph(program), []
        targets = [_ATEN.mul.Tensor, *([_ATEN.div.Tensor] if self.divisions else [])]
        for node in list(graph.nodes):
            if node.target in targets and _is_unit(node):
                node.replace_all_uses_with(argument(node, "self"))
                graph.erase_node(node)
                changes.append(extend.Change(node.name, "removed"))
        return extend.PassResult(program.evolve(graph=graph), tuple(changes))


def _is_unit(node: fx.Node) -> bool:
    """Whether a node is a tensor times or divided by one, in the tensor's own dtype."""
    x, factor = argument(node, "self"), argument(node, "other")
    if not isinstance(x, fx.Node) or isinstance(factor, fx.Node) or factor != 1:
        return False
    before, after = x.meta.get("val"), node.meta.get("val")
    return before is not None and after is not None and before.dtype == after.dtype

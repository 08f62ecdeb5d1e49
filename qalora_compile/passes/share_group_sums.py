"""share-group-sums: one group-sum for all readers of one tensor (q, k, v; gate, up)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qalora_compile.errors import PostconditionError
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import GROUP_SUM
from qalora_compile.ir.stages import ADAPTED, LEGALIZED
from qalora_compile.passes.framework.base import Change, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class ShareGroupSums(Pass):
    """Merge group-sums of one tensor with one group size.

    Before:  %1 = qalora.group_sum(%x, 32)
             %2 = qalora.group_sum(%x, 32)
    After:   %1 = qalora.group_sum(%x, 32), also for the readers of %2

    Fires on: every group_sum with the input and group size of an earlier one.
    Leaves alone: group-sums of other inputs or sizes.
    Exactness: exact, the same operator on the same operands.
    """

    name: ClassVar[str] = "share-group-sums"
    consumes: ClassVar[tuple[str, ...]] = (
        ADAPTED,
        *(
            f"{LEGALIZED}{target}"
            for target in ("ort", "ort-stock", "onnx", "openvino", "torch", "coreml")
        ),
    )
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Merge."""
        graph = program.copy_graph()
        first: dict[tuple[object, ...], fx.Node] = {}
        changes = []
        for node in list(graph.nodes):
            if node.target is not GROUP_SUM:
                continue
            keeper = first.setdefault(node.args, node)
            if keeper is not node:
                node.replace_all_uses_with(keeper)
                graph.erase_node(node)
                changes.append(Change(node.name, f"shares {keeper.name}", "same input and group"))
        return PassResult(program.evolve(graph=graph), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No two group-sums are equal."""
        seen = [node.args for node in after.graph.nodes if node.target is GROUP_SUM]
        if len(seen) != len(set(seen)):
            raise PostconditionError("two equal group-sums are left")

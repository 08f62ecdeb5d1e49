"""canonicalize-clamps: remove infinite bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qalora_compile.errors import PostconditionError
from qalora_compile.ir.meta import module_path
from qalora_compile.ir.ops.views import argument, arguments
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import FLOAT
from qalora_compile.passes.framework.base import Change, Pass, PassResult

_CLAMP = torch.ops.aten.clamp.default


@dataclass(frozen=True, kw_only=True)
class CanonicalizeClamps(Pass):
    """Remove the infinite bounds of clamps, which Mamba's time steps have.

    Before:  %1 = aten.clamp(%x, 0.0, inf)
    After:   %1 = aten.clamp(%x, 0.0)

    Fires on: clamps by numbers, of which the lower is −∞ or the upper ∞.
    Leaves alone: every other clamp.
    Exactness: bit for bit. Otherwise the infinity would make an exported file look broken.
    """

    name: ClassVar[str] = "canonicalize-clamps"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT,)
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Rewrite."""
        if not any(map(_is_unbounded, program.graph.nodes)):
            return PassResult(program.evolve())
        graph = program.copy_graph()
        changes = []
        for node in filter(_is_unbounded, list(graph.nodes)):
            changes.append(Change(module_path(node) or node.name, "infinite bounds left out"))
            x, low, high = arguments(node).values()
            kept = (None if low == -math.inf else low, None if high == math.inf else high)
            if kept == (None, None):
                node.replace_all_uses_with(x)
                graph.erase_node(node)
            else:
                node.args, node.kwargs = (x, *kept), {}
        return PassResult(program.evolve(graph=graph), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No such bound is left."""
        for node in filter(_is_unbounded, after.graph.nodes):
            raise PostconditionError("an infinite bound is left", where=f"node {node.name}")


def _is_unbounded(node: fx.Node) -> bool:
    if node.target is not _CLAMP:
        return False
    return bool(argument(node, "min") == -math.inf or argument(node, "max") == math.inf)

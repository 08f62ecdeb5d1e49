"""Heads of language models: the linear maps that score the rows of an embedding's table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from qalora_compile.ir.plan import EMBEDDING
from qalora_compile.ir.spec import ON_CODES
from qalora_compile.passes.uses import Use, operator_name


def find_heads(uses: Sequence[Use]) -> set[fx.Node]:
    """Nodes of the linear maps of a table's shape `[V, K]` behind which there is no other layer.

    Whether the head is tied to the table, that is, has its memory, does not matter.
    """
    tables = {tuple(use.tensor.shape) for use in uses if operator_name(use.node) == EMBEDDING}
    layers = {use.node for use in uses if use.linear is not None}
    return {
        use.node
        for use in uses
        if use.matrix is not None
        and tuple(use.matrix.shape) in tables
        and not _reaches(use.node, layers - {use.node})
    }


def _reaches(node: fx.Node, layers: set[fx.Node]) -> bool:
    """Whether what `node` computes goes into another layer, in float or on codes."""
    open_nodes, seen = [node], {node}
    while open_nodes:
        for user in open_nodes.pop().users:
            if user in layers or user.target in ON_CODES:
                return True
            if user not in seen:
                seen.add(user)
                open_nodes.append(user)
    return False

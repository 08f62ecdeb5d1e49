"""Operators that write into an operand, replaced by those that return the same as a new tensor."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.torch_internals import OpOverload, is_composed, schema_of

_ATEN = torch.ops.aten
_FRESH = frozenset(
    {
        *(_ATEN.linear.default, _ATEN.matmul.default, _ATEN.softmax.int),
        *(_ATEN.layer_norm.default, _ATEN.conv1d.default, _ATEN.conv2d.default),
    }
)
"""Composite operators that never return an operand or a part of it."""


def write_out_of_place(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Replace, in place, each call such as `add_` by `add` where nothing else can see the write.

    That is so where the operand is a value of the graph that no other tensor shares memory with:
    neither it nor any of its readers is a view. Readers that follow then read the result. All other
    calls that write are left as they are.

    Returns:
        Each replaced call with its operand. A write keeps the operand's dtype; a new tensor need
        not have it, and the caller has to see that it has.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    found = ((node, _write_elsewhere(node, order)) for node in order)
    return [(node, operand) for node, operand in found if operand is not None]


def _write_elsewhere(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """Replace a call if it may be; returns its operand then."""
    target = _counterpart(node)
    operand = None if target is None else _written(node)
    if target is None or operand is None or not _is_fresh(operand):
        return None
    before = [user for user in operand.users if order[user] < order[node]]
    if not all(_is_fresh(user) for user in before):
        return None
    node.target = target
    kept = {*before, node}
    operand.replace_all_uses_with(node, lambda user: user not in kept)
    return operand


def _counterpart(node: fx.Node) -> OpOverload | None:
    """The operator without the `_` at its name's end that returns one new tensor."""
    if not isinstance(node.target, OpOverload) or not schema_of(node.target).is_mutable:
        return None
    namespace, _, name = str(schema_of(node.target).name).partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    found = getattr(packet, schema_of(node.target).overload_name or "default", None)
    if not isinstance(found, OpOverload) or found is node.target:
        return None
    arguments = [[a.name for a in schema_of(each).arguments] for each in (node.target, found)]
    return found if arguments[0] == arguments[1] and not schema_of(found).is_mutable else None


def _written(node: fx.Node) -> fx.Node | None:
    """The only operand that a call writes into."""
    names = [
        a.name
        for a in schema_of(cast(OpOverload, node.target)).arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]
    found = argument(node, names[0]) if len(names) == 1 else None
    return found if isinstance(found, fx.Node) else None


def _is_fresh(node: fx.Node) -> bool:
    """Whether a node computes tensors of their own: no operand, and no view of one."""
    if node.target is operator.getitem:
        owner, place = argument(node, "a"), argument(node, "b")
        parts = [user for user in owner.users if user.target is operator.getitem]
        return [argument(part, "b") for part in parts].count(place) == 1 and _is_fresh(owner)
    if not isinstance(node.target, OpOverload):
        return False
    if is_composed(node.target) and node.target not in _FRESH:
        return False
    return all(result.alias_info is None for result in schema_of(node.target).returns)

"""What the fusing passes need to look through: casts that change nothing, views of heads."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.meta import shape_of

_ATEN = torch.ops.aten
_END = 2**62  # slices to the end of an axis say 2^63 − 1
_CASTS = (_ATEN.to.dtype, _ATEN.to.device, _ATEN.type_as.default, _ATEN.to.dtype_layout)
_SAME = (_ATEN.alias.default, _ATEN.contiguous.default)
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)


def through(value: object) -> fx.Node | None:
    """The node behind casts to its own dtype, aliases and slices of everything."""
    while isinstance(value, fx.Node) and _changes_nothing(value):
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def _changes_nothing(node: fx.Node) -> bool:
    if node.target in _SAME:
        return True
    if node.target in _CASTS:
        return _dtype(node) is not None and _dtype(node) == _dtype(node.args[0])
    if node.target is _ATEN.slice.Tensor:
        start, end = (*node.args[2:4], None, None)[:2]
        whole = start in (None, 0) and (end is None or (isinstance(end, int) and end > _END))
        return whole and len(node.args) < 5
    return False


def _dtype(value: object) -> torch.dtype | None:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.dtype if isinstance(found, Tensor) else None


def call(value: object, *targets: object) -> tuple[Any, ...] | None:
    """The arguments of the call behind `value`, if it is a call of one of `targets`."""
    node = through(value)
    return node.args if node is not None and node.target in targets else None


def operands(value: object, target: object) -> Iterator[tuple[object, object]]:
    """The two operands of a commutative call behind `value`, in both orders; nothing if it is none.

    Calls with further arguments (`add` with an `alpha`) do not count.
    """
    node = through(value)
    if node is not None and node.target is target and len(node.args) == 2 and not node.kwargs:
        first, second = node.args
        yield first, second
        yield second, first


def pair(value: object, *axes: int) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of `cat` along one of `axes`."""
    found = call(value, _ATEN.cat.default)
    if found is None or len(found) != 2 or found[1] not in axes or len(found[0]) != 2:
        return None
    first, second = map(through, found[0])
    return (first, second) if first is not None and second is not None else None


def number(value: object) -> float | None:
    """A Python number."""
    return float(value) if isinstance(value, (int, float)) else None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The node that reads `node`, if there is just one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def swapped_heads(value: object) -> fx.Node | None:
    """u, `[B, S, H, D]`, behind `transpose(u, 1, 2)`."""
    found = call(value, _ATEN.transpose.int)
    return through(found[0]) if found is not None and set(found[1:]) == {1, 2} else None


def rows_of_heads(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """A value `[B, H, S, D]` as `[B, S, H · D]`: what it was made from, or new nodes."""
    each = swapped_heads(value)
    if each is None:
        each = graph.call_function(_ATEN.transpose.int, (value, 1, 2))
    split = call(each, _ATEN.unflatten.int)
    if split is not None and isinstance(split[0], fx.Node) and split[1] == 2:
        return split[0]
    found = call(each, *_VIEWS)
    if found is not None:
        source, shape = through(found[0]), found[1]
        flat = None if source is None else shape_of(source)
        plain = isinstance(shape, (list, tuple)) and len(shape) == 4 and shape[2] == -1
        if source is not None and flat is not None and plain and len(flat) == 3:
            return source
    return graph.call_function(_ATEN.flatten.using_ints, (each, 2, 3))


def heads_of_rows(graph: fx.Graph, rows: fx.Node, heads: int) -> fx.Node:
    """A value `[B, S, H · D]` as `[B, H, S, D]`."""
    each = graph.call_function(_ATEN.unflatten.int, (rows, 2, [heads, -1]))
    return graph.call_function(_ATEN.transpose.int, (each, 1, 2))


def item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """One of several results."""
    return graph.call_function(operator.getitem, (node, index))

"""Conversion between heads as an axis, `[B, H, S, D]`, and in rows, `[B, S, H · D]`."""

from __future__ import annotations

import torch
from torch import fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.passes.framework.match import (
    Match,
    Op,
    Pattern,
    anything,
    either,
    match,
    node,
    op,
)

_ATEN = torch.ops.aten
VIEWS = (_ATEN.view.default, _ATEN.reshape.default)


def swapped(inner: Pattern) -> Op:
    """`[B, S, H, D]` transposed to `[B, H, S, D]`, or back."""
    return op(_ATEN.transpose.int, self=inner, dim0=1, dim1=2).swapping("dim0", "dim1")


def _is_split(shape: object) -> bool:
    return isinstance(shape, (list, tuple)) and len(shape) == 4 and shape[2] == -1


_ROWS = node("rows").where(lambda m: len(shape_of(m["rows"]) or ()) == 3)
_SIZES = anything("sizes").where(lambda m: _is_split(m["sizes"]))
_SPLIT = either(
    op(_ATEN.unflatten.int, self=node("rows"), dim=2),
    op(_ATEN.view.default, self=_ROWS, size=_SIZES),
    op(_ATEN.reshape.default, self=_ROWS, shape=_SIZES),
)


def rows_of_heads(value: fx.Node) -> fx.Node:
    """A value `[B, H, S, D]` as `[B, S, H · D]`: its source in rows, or new nodes."""
    found = match(value, swapped(_SPLIT))
    if isinstance(found, Match):
        rows: fx.Node = found["rows"]
        return rows
    found = match(value, swapped(node("each")))
    each = (
        found["each"]
        if isinstance(found, Match)
        else value.graph.call_function(_ATEN.transpose.int, (value, 1, 2))
    )
    return value.graph.call_function(_ATEN.flatten.using_ints, (each, 2, 3))


def heads_of_rows(rows: fx.Node, heads: int) -> fx.Node:
    """A value `[B, S, H · D]` as `[B, H, S, D]`."""
    each = rows.graph.call_function(_ATEN.unflatten.int, (rows, 2, [heads, -1]))
    return rows.graph.call_function(_ATEN.transpose.int, (each, 1, 2))

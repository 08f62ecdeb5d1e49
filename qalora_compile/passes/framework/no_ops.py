"""Nodes that change nothing: casts to a value's own dtype, aliases, complete slices."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qalora_compile.ir.ops.views import argument, arguments

_ATEN = torch.ops.aten
_END = 2**62  # slices to the end of an axis say 2^63 − 1
_CASTS = (_ATEN.to.dtype, _ATEN.to.device, _ATEN.type_as.default, _ATEN.to.dtype_layout)
_SAME = (_ATEN.alias.default, _ATEN.contiguous.default)


def through(value: object) -> fx.Node | None:
    """The node that a chain of nodes that change nothing reads; None for a constant."""
    while isinstance(value, fx.Node) and changes_nothing(value):
        value = argument(value, "self")
    return value if isinstance(value, fx.Node) else None


def changes_nothing(node: fx.Node) -> bool:
    """Whether a node returns its input with the same values and dtype."""
    if node.target in _SAME:
        return True
    if node.target in _CASTS:
        return _dtype(node) is not None and _dtype(node) == _dtype(argument(node, "self"))
    if node.target is _ATEN.slice.Tensor:
        given = arguments(node)
        end = given["end"]
        to_end = end is None or (isinstance(end, int) and end > _END)
        return given["start"] in (None, 0) and to_end and given["step"] == 1
    return False


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read `node`, directly or through nodes that change nothing."""
    found = []
    for user in node.users:
        passes_on = changes_nothing(user) and through(user) is through(node)
        found += readers(user) if passes_on else [user]
    return found


def _dtype(value: object) -> torch.dtype | None:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.dtype if isinstance(found, Tensor) else None

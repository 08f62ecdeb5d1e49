"""Weights whose columns a program holds in another order than the model: activation order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from qalora_compile.ir.lazy_tensor import materialize
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.integer_zero_linear import IntegerZeroLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.views import argument

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program

ORDER = "order"
"""Name of the tensor of an order, `[K]` int64, below the path of the first weight that has it."""
_CODES = ".qweight"
_SELECT = torch.ops.aten.index_select.default
_LAYERS = (GroupLinear.target, ExpertLinear.target, IntegerZeroLinear.target)


def column_orders(program: Program) -> dict[str, Tensor]:
    """The order of each weight on codes that `sort-columns` has sorted, by `Site.path`.

    Column i of the codes is column `order[i]` of the model's weight, `[K]` int64. Weights that
    share an order, and of which one owns the tensor, are all in it.
    """
    tensors, found = program.tensors(), {}
    for node in program.graph.nodes:
        order = _order_of(argument(node, "x")) if node.target in _LAYERS else None
        if order is not None:
            path = str(argument(node, "qweight").target).removesuffix(_CODES)
            found[path] = materialize(tensors[order]).detach()
    return found


def _order_of(x: object) -> str | None:
    """Name of the order in which an input is read, or None."""
    if not (isinstance(x, fx.Node) and x.target is _SELECT):
        return None
    name = str(getattr(argument(x, "index"), "target", ""))
    return name if name.endswith(f".{ORDER}") else None


def unsorted(values: Tensor, order: Tensor | None) -> Tensor:
    """Columns `[.., K]` in a weight's order back where the model has them."""
    if order is None:
        return values
    placed = torch.empty_like(values)
    placed[..., order] = values
    return placed

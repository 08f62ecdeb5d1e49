"""Activation order: weights whose columns a program stores in another order than the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from qalora_compile.ir.lazy_tensor import materialize
from qalora_compile.ir.ops.affine_linear import AffineLinear
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.integer_zero_linear import IntegerZeroLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.views import argument

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program

ORDER = "order"
"""Name of an order's tensor, `[K]` int64, below the path of the first weight that has it."""
_CODES = ".qweight"
_SELECT = torch.ops.aten.index_select.default
_LAYERS = tuple(v.target for v in (GroupLinear, ExpertLinear, IntegerZeroLinear, AffineLinear))


def column_orders(program: Program) -> dict[str, Tensor]:
    """The column order of each quantized weight that `sort-columns` has sorted, by `Site.path`.

    Column i of the codes is column `order[i]` of the model's weight; an order is `[K]` int64. The
    mapping holds every weight, also those that share the tensor of another.
    """
    tensors, found = program.tensors(), {}
    for node in program.graph.nodes:
        order = _order_of(argument(node, "x")) if node.target in _LAYERS else None
        if order is not None:
            path = str(argument(node, "qweight").target).removesuffix(_CODES)
            found[path] = materialize(tensors[order]).detach()
    return found


def _order_of(x: object) -> str | None:
    """Name of the order in which an input is read; None for the model's own order."""
    if not (isinstance(x, fx.Node) and x.target is _SELECT):
        return None
    name = str(getattr(argument(x, "index"), "target", ""))
    return name if name.endswith(f".{ORDER}") else None


def unsorted(values: Tensor, order: Tensor | None) -> Tensor:
    """Move columns `[.., K]` from a weight's order back to the model's."""
    if order is None:
        return values
    placed = torch.empty_like(values)
    placed[..., order] = values
    return placed

"""fuse-rms-norm: one operator for the root-mean-square norm that models write out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qalora_compile.ir.meta import move_site, shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import shaped_graph
from qalora_compile.ir.spec import RMS_NORM
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.ir.torch_internals import is_erased
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import call, number, operands, through

_ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FuseRmsNorm(Pass):
    """Replace a written-out root-mean-square norm.

    Before:  %1 = aten.pow.Tensor_Scalar(%x, 2)
             %2 = aten.mean.dim(%1, [-1], True)
             %3 = aten.add.Tensor(%2, 1e-06)
             %4 = aten.rsqrt(%3)
             %5 = aten.mul.Tensor(%x, %4)
             %6 = aten.mul.Tensor(@norm.weight, %5)
    After:   %6 = qalora.rms_norm(%x, @norm.weight, 1e-06)

    Fires on: that pattern with its factors in either order, with `pow(…, -0.5)` for `rsqrt`, and
    with casts that change no dtype in between; the weight has one axis and may be computed.
    Leaves alone: norms without a weight, over other axes, or computed in another dtype.
    Exactness: exact in real arithmetic; the products run in another order.
    """

    name: ClassVar[str] = "fuse-rms-norm"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        graph = shaped_graph(program)
        changes, skips = [], []
        for node in list(graph.nodes):
            found = None if is_erased(node) else _match(node)
            if found is not None:
                with graph.inserting_before(node):
                    new = graph.call_function(RMS_NORM, found)
                move_site(node, new)
                node.replace_all_uses_with(new)
                erase_unread([node])
                changes.append(Change(new.name, "root-mean-square norm"))
        for node in graph.nodes:
            why = _why_not(node)
            if why:
                skips.append(Change(node.name, "left as it is", why))
        return PassResult(program.evolve(graph=graph), tuple(changes), tuple(skips))


def _why_not(node: fx.Node) -> str:
    """Why the root of a mean of squares is no norm; empty where a node is no such root."""
    power = node.target is _ATEN.pow.Tensor_Scalar and node.args[1] == -0.5
    if node.target is not _ATEN.rsqrt.default and not power:
        return ""
    shifted = call(node.args[0], _ATEN.add.Tensor)
    mean = call(shifted[0], _ATEN.mean.dim) if shifted is not None else None
    square = call(mean[0], _ATEN.pow.Tensor_Scalar) if mean is not None else None
    if mean is None or square is None or square[1] != 2:
        return ""
    inner, _ = _root_of_mean_square(node)
    if inner is None:
        return "the mean is not over the last axis, or what is added to it is no number"
    if shape_of(inner) is None:
        return "the shape of what is normed is not known"
    return "no weight of one axis is multiplied, or another dtype lies between"


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """x, weight and eps of the norm that ends in `node`."""
    for weight, normed in operands(node, _ATEN.mul.Tensor):
        if not isinstance(weight, fx.Node) or len(shape_of(weight) or ()) != 1:
            continue
        for x, root in operands(normed, _ATEN.mul.Tensor):
            inner, eps = _root_of_mean_square(root)
            if inner is not None and inner is through(x):
                return inner, weight, eps
    return None


def _root_of_mean_square(value: object) -> tuple[fx.Node | None, float]:
    """X and eps of `rsqrt(mean(x²) + eps)`."""
    power = call(value, _ATEN.pow.Tensor_Scalar)
    inverse = call(value, _ATEN.rsqrt.default)
    if inverse is None and power is not None and power[1] == -0.5:
        inverse = power
    shifted = call(inverse[0], _ATEN.add.Tensor) if inverse is not None else None
    eps = number(shifted[1]) if shifted is not None and len(shifted) == 2 else None
    mean = call(shifted[0], _ATEN.mean.dim) if shifted is not None else None
    square = call(mean[0], _ATEN.pow.Tensor_Scalar) if mean is not None else None
    if eps is None or mean is None or square is None or square[1] != 2:
        return None, 0.0
    return (
        (through(square[0]), eps) if list(mean[1]) == [-1] and mean[2:] == (True,) else (None, 0.0)
    )

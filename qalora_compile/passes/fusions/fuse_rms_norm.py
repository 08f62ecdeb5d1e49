"""fuse-rms-norm: one operator for a root-mean-square norm in elementary operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qalora_compile.ir.meta import move_site, shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.transformer_fusions import RmsNorm
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import (
    Match,
    anchor,
    const,
    either,
    mul,
    node,
    number,
    op,
)
from qalora_compile.passes.framework.rewrite import rewrite_matches

_ATEN = torch.ops.aten

_SQUARE = op(_ATEN.pow.Tensor_Scalar, self=node("x"), exponent=2).recognizable()
_MEAN = op(
    _ATEN.mean.dim,
    self=_SQUARE,
    dim=const([-1], otherwise="the mean is not over the last axis"),
    keepdim=True,
)
_EPS = number("eps").otherwise("what is added to the mean is not a number")
_SHIFTED = op(_ATEN.add.Tensor, self=_MEAN, other=_EPS)
_INVERSE_ROOT = either(
    op(_ATEN.rsqrt.default, self=_SHIFTED),
    op(_ATEN.pow.Tensor_Scalar, exponent=-0.5, self=_SHIFTED),
)
_WEIGHT = (
    node("weight")
    .otherwise("no weight is multiplied")
    .where(lambda m: len(shape_of(m["weight"]) or ()) == 1, "what is multiplied has not one axis")
)
_X = node("x").otherwise("what is multiplied is not what was squared")
_NORMED = mul(_X, anchor(_INVERSE_ROOT))
_NORM = mul(_WEIGHT, _NORMED).otherwise("no product with a weight reads it")


@dataclass(frozen=True, kw_only=True)
class FuseRmsNorm(Pass):
    """Fuse a root-mean-square norm in elementary operators.

    Before:  %1 = aten.pow.Tensor_Scalar(%x, 2)
             %2 = aten.mean.dim(%1, [-1], True)
             %3 = aten.add.Tensor(%2, 1e-06)
             %4 = aten.rsqrt(%3)
             %5 = aten.mul.Tensor(%x, %4)
             %6 = aten.mul.Tensor(@norm.weight, %5)
    After:   %6 = qalora.rms_norm(%x, @norm.weight, 1e-06)

    Fires on: this pattern, with factors in either order, `pow(…, -0.5)` for `rsqrt`, and casts that
    change no dtype in between. The weight has one axis and may be computed.
    Leaves alone: norms without a weight, over other axes, or computed in another dtype.
    Exactness: exact in real arithmetic; the products run in another order.
    """

    name: ClassVar[str] = "fuse-rms-norm"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        return rewrite_matches(program, (_NORM,), _rewrite)


def _rewrite(found: Match) -> Change:
    end = found.node
    with end.graph.inserting_before(end):
        new = RmsNorm.create(end.graph, found["x"], found["weight"], float(found["eps"]))
    move_site(end, new)
    end.replace_all_uses_with(new)
    erase_unread([end])
    return Change(new.name, "root-mean-square norm")

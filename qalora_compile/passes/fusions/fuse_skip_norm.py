"""fuse-skip-norm: one operator for a sum and its root-mean-square norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qalora_compile.ir.meta import shape_of, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.transformer_fusions import SkipRmsNorm
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import RMS_NORM
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import (
    Captured,
    Match,
    anything,
    const,
    node,
    op,
)
from qalora_compile.passes.framework.no_ops import readers, through
from qalora_compile.passes.framework.rewrite import item, rewrite_matches


def _shapes_agree(found: Captured) -> bool:
    return shape_of(found["x"]) == shape_of(found["skip"])


def _is_read_later(found: Captured) -> bool:
    """Whether all readers of the sum come after the norm, which then computes it."""
    return not any(reader < found["norm"] for reader in readers(found["total"]))


_SUM = (
    op(
        torch.ops.aten.add.Tensor,
        self=node("x"),
        other=node("skip").otherwise("a number is added"),
        alpha=const(1, otherwise="the sum has a factor"),
    )
    .recognizable()
    .named("total")
    .where(lambda m: site_of(m["total"]) is None, "the sum is the output of a layer")
    .where(lambda m: len(shape_of(m["x"]) or ()) == 3, "the sum has not three axes")
    .where(_shapes_agree, "the shapes of the summands differ")
)
_NORM = (
    op(RMS_NORM, x=_SUM, weight=anything("weight"), eps=anything("eps"))
    .named("norm")
    .where(_is_read_later, "the sum is read before the norm is computed")
)


@dataclass(frozen=True, kw_only=True)
class FuseSkipNorm(Pass):
    """Fuse a residual sum with its root-mean-square norm.

    Before:  %1 = aten.add.Tensor(%x, %y)                       [B, S, N]
             %2 = qalora.rms_norm(%1, @norm.weight, 1e-06)
    After:   %3 = qalora.skip_rms_norm(%x, %y, @norm.weight, 1e-06)
             %2, %1 = its two results

    Fires on: sums of two tensors of one shape with three axes.
    Leaves alone: sums that are the output of a layer (with its correction or bias), since other
    tools find it by name; sums that are read before the norm's weight is computed.
    Exactness: the same sums and products.
    """

    name: ClassVar[str] = "fuse-skip-norm"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        return rewrite_matches(program, (_NORM,), _rewrite)


def _rewrite(found: Match) -> Change:
    norm, total = found["norm"], found["total"]
    _skip_casts(total)
    summands = argument(total, "self"), argument(total, "other")
    with norm.graph.inserting_before(norm):
        new = SkipRmsNorm.create(norm.graph, *summands, found["weight"], found["eps"])
        parts = item(new, 0), item(new, 1)
    for old, part in zip((norm, total), parts, strict=True):
        part.meta["val"] = old.meta.get("val")
        old.replace_all_uses_with(part)
        erase_unread([old])
    erase_unread(parts)
    return Change(norm.name, "sum and root-mean-square norm")


def _skip_casts(total: fx.Node) -> None:
    """Let readers of no-op casts read the sum itself, since the casts come before the norm."""
    for user in list(total.users):
        if through(user) is through(total):
            _skip_casts(user)
            user.replace_all_uses_with(total)
            erase_unread([user])

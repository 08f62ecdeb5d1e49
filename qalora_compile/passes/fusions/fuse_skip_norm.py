"""fuse-skip-norm: one operator for a sum and its root-mean-square norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qalora_compile.ir.meta import shape_of, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import shaped_graph
from qalora_compile.ir.spec import RMS_NORM, SKIP_RMS_NORM
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import item, through

_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True, kw_only=True)
class FuseSkipNorm(Pass):
    """Replace a root-mean-square norm of a sum, where what is skipped comes back.

    Before:  %1 = aten.add.Tensor(%x, %y)                       [B, S, N]
             %2 = qalora.rms_norm(%1, @norm.weight, 1e-06)
    After:   %3 = qalora.skip_rms_norm(%x, %y, @norm.weight, 1e-06)
             %2, %1 = its two results

    Fires on: sums of two tensors of one shape with three axes.
    Leaves alone: sums that are the output of a layer (of its correction or bias), which are known
    by their name; sums that are read before the norm's weight is known.
    Exactness: the same sums and products.
    """

    name: ClassVar[str] = "fuse-skip-norm"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        graph = shaped_graph(program)
        changes, skips = [], []
        place = {node: number for number, node in enumerate(graph.nodes)}
        for norm in [node for node in graph.nodes if node.target is RMS_NORM]:
            total, weight, eps = norm.args
            if not isinstance(total, fx.Node) or total.target is not _ADD:
                continue
            _skip_casts(total)
            why = _unfit(total, norm, place)
            if why is not None:
                skips.append(Change(norm.name, "left as it is", why))
                continue
            _rewrite(graph, norm, total, (weight, eps))
            changes.append(Change(norm.name, "sum and root-mean-square norm"))
        return PassResult(program.evolve(graph=graph), tuple(changes), tuple(skips))


def _skip_casts(total: fx.Node) -> None:
    """Let readers of casts that change nothing read the sum: the casts stand before the norm."""
    for user in list(total.users):
        if through(user) is total:
            user.replace_all_uses_with(total)
            erase_unread([user])


def _unfit(total: fx.Node, norm: fx.Node, place: dict[fx.Node, int]) -> str | None:
    """Why a sum cannot be computed with its norm; None where it can."""
    if site_of(total) is not None:
        return "the sum is the output of a layer"
    shapes = [shape_of(part) if isinstance(part, fx.Node) else None for part in total.args]
    if len(shapes) != 2 or total.kwargs or shapes[0] is None or len(shapes[0]) != 3:
        return "the sum has no three axes, or a factor"
    if shapes[0] != shapes[1]:
        return "the shapes of the summands differ"
    if any(place.get(user, len(place)) < place[norm] for user in total.users):
        return "the sum is read before the norm is computed"
    return None


def _rewrite(graph: fx.Graph, norm: fx.Node, total: fx.Node, rest: tuple[Any, ...]) -> None:
    with graph.inserting_before(norm):
        new = graph.call_function(SKIP_RMS_NORM, (*total.args, *rest))
        parts = item(graph, new, 0), item(graph, new, 1)
    for old, part in zip((norm, total), parts, strict=True):
        part.meta["val"] = old.meta.get("val")
        old.replace_all_uses_with(part)
        erase_unread([old])
    erase_unread(parts)

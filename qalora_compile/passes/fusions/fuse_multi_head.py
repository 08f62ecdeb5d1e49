"""fuse-multi-head: attention in the form of ONNX Runtime's own operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.transformer_fusions import (
    Attention,
    JoinGroups,
    MultiHeadAttention,
    SplitGroups,
)
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import ATTENTION
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import (
    Match,
    anything,
    op,
)
from qalora_compile.passes.framework.rewrite import item, rewrite_matches

_ATEN = torch.ops.aten
_LOWEST = torch.finfo(torch.float32).min
"""Not −∞: rows of padding would consist of it and give NaN, which the next layer reads."""


def _heads_of(mask: object) -> int | None:
    """Size of the third axis from the end: 1 if there is none, None if it is not known."""
    shape = shape_of(mask) if isinstance(mask, fx.Node) else None
    if shape is None or len(shape) < 2:
        return None
    size = shape[-3] if len(shape) > 2 else 1
    return size if isinstance(size, int) else None


_MASK = anything("mask").where(
    lambda m: m["mask"] is None or _heads_of(m["mask"]) in (1, m["heads"]),
    "the number of heads of the mask is not known",
)
_PATTERN = op(ATTENTION, heads=anything("heads"), mask=_MASK).recognizable()


@dataclass(frozen=True, kw_only=True)
class FuseMultiHead(Pass):
    """Replace attention by a form in which every head has its own keys and masks are added.

    Before:  %1 = qalora.attention(%q, %k, %v, %mask, %past.key, %past.value, 4, 2, 0.25)
    After:   %2 = aten.where.Scalar(%mask, 0.0, -3.4e+38)
             %3 = aten.cat([%2, %2], 2)                         4 heads, 2 of keys
             %4 = qalora.join_groups(%q, 4, 2)                  [B, S, 4 · D] to [B, 2 · S, 2 · D]
             %5 = qalora.multi_head_attention(%4, %k, %v, %3, %past.key, %past.value, 2, 0.25)
             %6 = qalora.split_groups(%5.0, 4, 2)
             %1 = %6 and the other results of %5

    Heads that share keys become further rows of one head. Each key is then read once for all of
    them, and padding, a past or a batch is no special case. (GroupQueryAttention takes such heads
    directly, but refuses several tokens of several sequences after a past.)

    Fires on: attention with a mask or without, with a past or without.
    Leaves alone: masks with a number of heads that is not known.
    Exactness: the same products; sums run in another order. A row whose mask excludes every key, as
    only padding has, gives the mean of all values, not NaN.
    """

    name: ClassVar[str] = "fuse-multi-head"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        biases = _Biases()
        return rewrite_matches(program, (_PATTERN,), lambda found: _rewrite(found, biases))


@dataclass
class _Biases:
    """The additive form of each mask, made once, where it is first needed."""

    made: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def get(self, mask: fx.Node, dtype: torch.dtype, heads: int, kv_heads: int) -> fx.Node:
        """`[B or 1, Hk or 1, G · S, T]` for a mask `[B or 1, H or 1, S, T]`."""
        key = mask, dtype, heads, kv_heads
        if key not in self.made:
            numbers = self._numbers(mask, dtype)
            for _ in range(4 - len(shape_of(mask) or ())):
                numbers = mask.graph.call_function(_ATEN.unsqueeze.default, (numbers, 0))
            self.made[key] = self._rows(numbers, _heads_of(mask) == 1, kv_heads, heads // kv_heads)
        return self.made[key]

    def _numbers(self, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
        """0 where a key takes part and the lowest number elsewhere; float masks stay unchanged."""
        value = mask.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype is not torch.bool:
            return mask
        new = mask.graph.call_function(_ATEN.where.Scalar, (mask, 0.0, _LOWEST))
        if dtype is torch.float32:
            return new
        return mask.graph.call_function(_ATEN.to.dtype, (new, dtype))

    @staticmethod
    def _rows(bias: fx.Node, shared: bool, kv_heads: int, groups: int) -> fx.Node:
        """The rows of all heads of a group, one head after another."""
        if groups == 1:
            return bias
        if shared:
            return bias.graph.call_function(_ATEN.cat.default, ([bias] * groups, 2))
        each = bias.graph.call_function(_ATEN.unflatten.int, (bias, 1, [kv_heads, groups]))
        return bias.graph.call_function(_ATEN.flatten.using_ints, (each, 2, 3))


def _rewrite(found: Match, biases: _Biases) -> Change:
    node, old = found.node, Attention.of(found.node)
    graph, heads, kv_heads = node.graph, old.heads, old.kv_heads
    grouped = heads != kv_heads
    with graph.inserting_before(node):
        bias = biases.get(old.mask, _dtype(node), heads, kv_heads) if old.mask else None
        rows = JoinGroups.create(graph, old.q, heads, kv_heads) if grouped else old.q
        rest = old.k, old.v, bias, old.past_key, old.past_value, kv_heads, old.scale
        new = MultiHeadAttention.create(graph, rows, *rest)
    for result in list(node.users):
        index = argument(result, "b")
        with graph.inserting_before(result):
            part = item(new, index)
            if grouped and index == 0:
                part = SplitGroups.create(graph, part, heads, kv_heads)
        part.meta["val"] = result.meta.get("val")
        result.replace_all_uses_with(part)
        erase_unread([result])
    erase_unread([node])
    return Change(new.name, f"{heads} heads, {kv_heads} of keys and values")


def _dtype(node: fx.Node) -> torch.dtype:
    """The dtype of attention's results, as recorded for one of them."""
    values = [user.meta.get("val") for user in node.users]
    return next((v.dtype for v in values if isinstance(v, Tensor)), torch.float32)

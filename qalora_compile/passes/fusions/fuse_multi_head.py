"""fuse-multi-head: attention as ONNX Runtime's own operator has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import shaped_graph
from qalora_compile.ir.spec import ATTENTION, JOIN_GROUPS, MULTI_HEAD_ATTENTION, SPLIT_GROUPS
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import item

_ATEN = torch.ops.aten
_LOWEST = torch.finfo(torch.float32).min
"""Not −∞: a row of nothing else would give no number, in padding, which the next layer reads."""


@dataclass(frozen=True, kw_only=True)
class FuseMultiHead(Pass):
    """Replace attention by one in which every head has keys of its own, and masks are added.

    Before:  %1 = qalora.attention(%q, %k, %v, %mask, %past.key, %past.value, 4, 2, 0.25)
    After:   %2 = aten.where.Scalar(%mask, 0.0, -3.4e+38)
             %3 = aten.cat([%2, %2], 2)                         4 heads, 2 of keys
             %4 = qalora.join_groups(%q, 4, 2)                  [B, S, 4 · D] to [B, 2 · S, 2 · D]
             %5 = qalora.multi_head_attention(%4, %k, %v, %3, %past.key, %past.value, 2, 0.25)
             %6 = qalora.split_groups(%5.0, 4, 2)
             %1 = %6 and the other results of %5

    Heads that share keys become further rows of one head: each key is read once for all of them,
    and neither padding nor a past nor a batch is a special case. (GroupQueryAttention, which takes
    such heads as they are, refuses several tokens of several sequences after a past.)

    Fires on: attention with a mask or without, with a past or without.
    Leaves alone: masks with a number of heads that is not known.
    Exactness: the same products; sums run in another order. A row whose mask excludes every key,
    which only padding has, gives the mean of all values, and no number that is none.
    """

    name: ClassVar[str] = "fuse-multi-head"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        graph = shaped_graph(program)
        biases = _Biases(graph)
        changes, skips = [], []
        for node in [n for n in graph.nodes if n.target is ATTENTION]:
            mask, heads = node.args[3], node.args[6]
            if mask is not None and _heads_of(mask) not in (1, heads):
                skips.append(Change(node.name, "left as it is", "the mask's heads are not known"))
                continue
            new = _rewrite(graph, node, biases)
            what = f"{heads} heads, {node.args[7]} of keys and values"
            changes.append(Change(new.name, what))
        return PassResult(program.evolve(graph=graph), tuple(changes), tuple(skips))


@dataclass
class _Biases:
    """What is added for each mask, made once, where it is first needed."""

    graph: fx.Graph
    made: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def get(self, mask: fx.Node, dtype: torch.dtype, heads: int, kv_heads: int) -> fx.Node:
        """`[B or 1, Hk or 1, G · S, T]` for a mask `[B or 1, H or 1, S, T]`."""
        key = mask, dtype, heads, kv_heads
        if key not in self.made:
            numbers = self._numbers(mask, dtype)
            for _ in range(4 - len(shape_of(mask) or ())):
                numbers = self.graph.call_function(_ATEN.unsqueeze.default, (numbers, 0))
            self.made[key] = self._rows(numbers, _heads_of(mask) == 1, kv_heads, heads // kv_heads)
        return self.made[key]

    def _numbers(self, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
        """0 where a key takes part and the lowest number where not; numbers stay as they are."""
        value = mask.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype is not torch.bool:
            return mask
        new = self.graph.call_function(_ATEN.where.Scalar, (mask, 0.0, _LOWEST))
        if dtype is torch.float32:
            return new
        return self.graph.call_function(_ATEN.to.dtype, (new, dtype))

    def _rows(self, bias: fx.Node, shared: bool, kv_heads: int, groups: int) -> fx.Node:
        """The rows of all heads of a group, one head after another."""
        if groups == 1:
            return bias
        if shared:
            return self.graph.call_function(_ATEN.cat.default, ([bias] * groups, 2))
        each = self.graph.call_function(_ATEN.unflatten.int, (bias, 1, [kv_heads, groups]))
        return self.graph.call_function(_ATEN.flatten.using_ints, (each, 2, 3))


def _heads_of(mask: object) -> int | None:
    """Size of the last axis but two, 1 where there is none; None where it is not known."""
    shape = shape_of(mask) if isinstance(mask, fx.Node) else None
    if shape is None or len(shape) < 2:
        return None
    size = shape[-3] if len(shape) > 2 else 1
    return size if isinstance(size, int) else None


def _rewrite(graph: fx.Graph, node: fx.Node, biases: _Biases) -> fx.Node:
    q, k, v, mask, past_key, past_value, heads, kv_heads, scale = cast(tuple[Any, ...], node.args)
    groups = heads != kv_heads
    with graph.inserting_before(node):
        bias = None if mask is None else biases.get(mask, _dtype(node), heads, kv_heads)
        rows = graph.call_function(JOIN_GROUPS, (q, heads, kv_heads)) if groups else q
        args = (rows, k, v, bias, past_key, past_value, kv_heads, scale)
        new = graph.call_function(MULTI_HEAD_ATTENTION, args)
    for old in list(node.users):
        with graph.inserting_before(old):
            part = item(graph, new, cast(int, old.args[1]))
            if groups and old.args[1] == 0:
                part = graph.call_function(SPLIT_GROUPS, (part, heads, kv_heads))
        part.meta["val"] = old.meta.get("val")
        old.replace_all_uses_with(part)
        erase_unread([old])
    return new


def _dtype(node: fx.Node) -> torch.dtype:
    """The dtype of attention's results, from what was recorded of one of them."""
    values = [user.meta.get("val") for user in node.users]
    return next((v.dtype for v in values if isinstance(v, Tensor)), torch.float32)

"""fuse-attention: one operator for attention over a key-value cache with shared heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.transformer_fusions import Attention
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.ir.torch_internals import is_erased
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import (
    Captured,
    Match,
    Op,
    Pattern,
    anchor,
    anything,
    const,
    either,
    node,
    number,
    op,
)
from qalora_compile.passes.framework.no_ops import readers
from qalora_compile.passes.framework.rewrite import item, rewrite_matches
from qalora_compile.passes.fusions.head_layout import VIEWS, heads_of_rows, rows_of_heads, swapped

_ATEN = torch.ops.aten


def _keys(name: str) -> Pattern:
    """Keys or values `[B, Hk, T, D]`, with or without a past and a repetition of each head."""
    past = node(f"past_{name}").where(lambda m: m[f"past_{name}"].op == "placeholder")
    new = node(name).where(lambda m: _has_tokens(m[name]))
    with_past = op(_ATEN.cat.default, tensors=(past, new), dim=const(-2, 2))
    each = either(with_past.named(f"all_{name}"), node(name))
    added = op(_ATEN.unsqueeze.default, self=each, dim=2)
    sizes = anything(f"{name}_sizes")
    repeated = op(*VIEWS, self=op(_ATEN.expand.default, self=added, size=sizes))
    repeated = repeated.named(f"repeated_{name}").where(lambda m: _repeats(m, name))
    return either(repeated, each, final=True)


def _has_tokens(new: fx.Node) -> bool:
    """Whether new keys have a token in every call, as ONNX's Attention wants.

    A merged decoder computes those of its encoder in its first step alone (`s31 - s90`).
    """
    shape = shape_of(new)
    return shape is None or len(shape) != 4 or "-" not in str(shape[2])


def _repeats(found: Captured, name: str) -> bool:
    """Whether each head was repeated along an added axis, and the axes were joined."""
    sizes = found[f"{name}_sizes"]
    before, after = shape_of(found[name]), shape_of(found[f"repeated_{name}"])
    if before is None or after is None or len(sizes) != 5:
        return False
    heads, repeats = before[1], sizes[2]
    return isinstance(heads, int) and isinstance(repeats, int) and after[1] == heads * repeats


def _takes_past(found: Captured) -> bool:
    """Whether both keys and values have a past that the operator can append to, or neither.

    It returns all keys and values, so nothing may read them before it (as Doge's mask does).
    """
    names = [name for name in ("key", "value") if f"all_{name}" in found]
    return len(names) != 1 and not any(_is_read_early(found, name) for name in names)


def _is_read_early(found: Captured, name: str) -> bool:
    attention, total = found["attention"], found[f"all_{name}"]
    path = set(_path(argument(attention, name), total))
    return any(user < attention and user not in path for user in total.users)


def _path(value: fx.Node, total: fx.Node) -> Iterator[fx.Node]:
    """The nodes from `value` back to `total`, which it is made from."""
    while value is not total:
        yield value
        value = argument(value, "self")


def _are_computed(found: Captured) -> bool:
    return not found["key"].op == found["value"].op == "placeholder"


def _has_heads(found: Captured) -> bool:
    shapes = [shape_of(found[name]) for name in ("query", "key", "value")]
    return all(s is not None and len(s) == 4 and isinstance(s[1], int) for s in shapes)


def _sizes(found: Captured | Match) -> tuple[Any, int, int]:
    """Width of a head of q, number of heads of q, and of k."""
    (_, heads, _, width), kv = shape_of(found["query"]) or (), shape_of(found["key"]) or ()
    return width, int(heads), int(kv[1])


def _heads_fit(found: Captured) -> bool:
    width, heads, kv_heads = _sizes(found)
    return isinstance(width, int) and heads % kv_heads == 0


_ATTENTION = (
    op(
        _ATEN.scaled_dot_product_attention.default,
        dropout_p=const(0, otherwise="it drops values"),
        is_causal=const(False, otherwise="it is causal from the first key on"),
        query=node("query"),
        key=_keys("key"),
        value=_keys("value"),
        attn_mask=anything("mask"),
        scale=either(const(None), number("scale")),
        enable_gqa=anything(),
    )
    .named("attention")
    .recognizable()
    .where(_takes_past)
    .where(_are_computed, "its keys are an input, which every call would lay out in rows and back")
    .where(_has_heads, "the number of heads is not known")
    .where(_heads_fit, "the heads of q are not a multiple of those of k")
)


def _has_one_reader(name: str) -> Callable[[Captured], bool]:
    return lambda found: len(readers(found[name])) == 1


def _in_rows(heads: Pattern) -> Op:
    """The result as `[B, S, H · D]`, if nothing else reads it."""
    across = swapped(heads).named("across").where(_has_one_reader("across"))
    return (
        op(*VIEWS, self=across).named("rows").where(lambda m: len(shape_of(m["rows"]) or ()) == 3)
    )


_ALONE = anchor(_ATTENTION.where(_has_one_reader("attention")))
_VIEWED = (
    op(*VIEWS, self=_ALONE)
    .named("viewed")
    .where(lambda m: shape_of(m["viewed"]) == shape_of(m["attention"]))
    .where(_has_one_reader("viewed"))
)
_PATTERNS = _in_rows(_VIEWED), _in_rows(_ALONE), _ATTENTION


@dataclass(frozen=True, kw_only=True)
class FuseAttention(Pass):
    """Replace scaled_dot_product_attention with what surrounds it.

    Before:  %1 = aten.cat([%past.key, %k], -2)                 %k, %v: [B, Hk, S, D]
             %2 = aten.cat([%past.value, %v], -2)
             %3 = each head of %1 repeated for the heads of q that share it, %4 = of %2
             %5 = aten.scaled_dot_product_attention(%q, %3, %4, %mask, scale=0.25)
             %6 = heads of %5 in rows                           [B, S, H · D]
    After:   %7 = qalora.attention(rows of %q, %k, %v, %mask, %past.key, %past.value, 4, 2, 0.25)
             %6, %1, %2 = its three results

    Fires on: attention whose heads are known, with or without a past, with or without a mask.
    Leaves alone: dropout in training, `is_causal` (which counts from the first key, not from the
    past), heads that capture did not record, and keys that are themselves an input (from an
    encoder), since the operator takes rows and every call would copy them.
    Exactness: the same products; sums run in another order.
    """

    name: ClassVar[str] = "fuse-attention"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        return rewrite_matches(program, _PATTERNS, _rewrite)


def _rewrite(found: Match) -> Change:
    (width, heads, kv_heads), scale = _sizes(found), found.captured.get("scale")
    attention, end, graph = found["attention"], found.node, found.node.graph
    names = [name for name in ("key", "value") if f"all_{name}" in found.captured]
    with graph.inserting_before(attention):
        query, key, value = (rows_of_heads(found[name]) for name in ("query", "key", "value"))
        key_past, value_past = (found["past_key"], found["past_value"]) if names else (None, None)
        scale = width**-0.5 if scale is None else float(scale)
        rows = query, key, value, found["mask"], key_past, value_past
        new = Attention.create(graph, *rows, heads, kv_heads, scale)
        parts = [item(new, index) for index in range(3)]
        y = parts[0] if "rows" in found.captured else heads_of_rows(parts[0], heads)
    y.meta["val"] = end.meta.get("val")
    end.replace_all_uses_with(y)
    erase_unread([end])
    for name, part in zip(names, parts[1:], strict=False):
        total = found[f"all_{name}"]
        part.meta["val"] = total.meta.get("val")
        total.replace_all_uses_with(part, delete_user_cb=lambda user: not is_erased(user))
        erase_unread([total])
    erase_unread(parts)
    what = f"{heads} heads, {kv_heads} of keys and values"
    return Change(attention.name, what, f"{'with' if names else 'without'} a past")

"""fuse-attention: one operator for attention over a key-value cache with shared heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import shaped_graph
from qalora_compile.ir.spec import ATTENTION
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.ir.torch_internals import is_erased
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import (
    call,
    heads_of_rows,
    item,
    number,
    only_reader,
    pair,
    rows_of_heads,
    through,
)

_ATEN = torch.ops.aten
_SDPA = _ATEN.scaled_dot_product_attention.default
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)
_OPTIONS = ("attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True, kw_only=True)
class FuseAttention(Pass):
    """Replace scaled_dot_product_attention with what surrounds it.

    Before:  %1 = aten.cat([%past.key, %k], -2)                 %k, %v: [B, Hk, S, D]
             %2 = aten.cat([%past.value, %v], -2)
             %3 = each head of %1 repeated for the heads of q that share it, %4 = of %2
             %5 = aten.scaled_dot_product_attention(%q, %3, %4, %mask, scale=0.25)
             %6 = heads of %5 side by side                      [B, S, H · D]
    After:   %7 = qalora.attention(rows of %q, %k, %v, %mask, %past.key, %past.value, 4, 2, 0.25)
             %6, %1, %2 = its three results

    Fires on: attention whose heads are known, with or without a past, with or without a mask.
    Leaves alone: dropout in training, `is_causal` (which counts from the first key, not from the
    past), heads that capture did not record, and keys that are an input as they are (of an
    encoder): the operator takes rows, and they would be copied in every call.
    Exactness: the same products; sums run in another order.
    """

    name: ClassVar[str] = "fuse-attention"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        graph = shaped_graph(program)
        changes, skips = [], []
        for node in list(graph.nodes):
            if node.target is not _SDPA:
                continue
            found = _match(node)
            if isinstance(found, str):
                skips.append(Change(node.name, "left as it is", found))
                continue
            _rewrite(graph, found)
            what = f"{found.heads} heads, {found.kv_heads} of keys and values"
            changes.append(
                Change(node.name, what, "with a past" if found.past else "without a past")
            )
        return PassResult(program.evolve(graph=graph), tuple(changes), tuple(skips))


@dataclass(frozen=True)
class _Attention:
    """q, k, v `[B, H, S, D]`; the past, and the nodes that hold all keys and values."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    past: tuple[fx.Node, fx.Node] | None
    totals: tuple[fx.Node, fx.Node] | None
    heads: int
    kv_heads: int
    scale: float


def _match(node: fx.Node) -> _Attention | str:
    """The attention around a node, or why it stays."""
    options = dict(zip(_OPTIONS, node.args[3:], strict=False)) | dict(node.kwargs)
    if options.get("dropout_p") or options.get("is_causal"):
        return "it drops values, or is causal from the first key on"
    q, keys, values = map(through, node.args[:3])
    assert q is not None and keys is not None and values is not None
    keys, values = _without_repeats(keys), _without_repeats(values)
    first, second = _split_past(keys), _split_past(values)
    past = totals = None
    k, v = keys, values
    early = [_read_early(part, node, node.args[at]) for at, part in ((1, keys), (2, values))]
    if first is not None and second is not None and not any(early):
        past, totals = (first[0], second[0]), (keys, values)
        k, v = first[1], second[1]
    if k.op == v.op == "placeholder":
        return "its keys are an input, which every call would turn to rows and back"
    shapes = [shape_of(part) for part in (q, k, v)]
    if any(s is None or len(s) != 4 or not isinstance(s[1], int) for s in shapes):
        return "the number of heads is not known"
    heads, kv_heads = (int(s[1]) for s in shapes[:2] if s is not None)
    width = shapes[0][3] if shapes[0] is not None else None
    if not isinstance(width, int) or heads % kv_heads:
        return "the heads of q are no multiple of those of k"
    scale = number(options.get("scale"))
    mask = options.get("attn_mask")
    return _Attention(
        node,
        q,
        k,
        v,
        mask if isinstance(mask, fx.Node) else None,
        past,
        totals,
        heads,
        kv_heads,
        width**-0.5 if scale is None else scale,
    )


def _without_repeats(value: fx.Node) -> fx.Node:
    """`[B, Hk, T, D]` behind `reshape(expand(unsqueeze(·, 2)))`, which repeats each head."""
    reshaped = call(value, *_VIEWS)
    expanded = call(reshaped[0], _ATEN.expand.default) if reshaped is not None else None
    added = call(expanded[0], _ATEN.unsqueeze.default) if expanded is not None else None
    if added is None or added[1] != 2:
        return value
    source, sizes = through(added[0]), (expanded or ((), ()))[1]
    shape = None if source is None else shape_of(source)
    whole = shape_of(value)
    if source is None or shape is None or whole is None or len(sizes) != 5:
        return value
    repeats = sizes[2]
    fits = isinstance(repeats, int) and isinstance(shape[1], int) and whole[1] == shape[1] * repeats
    return source if fits else value


def _split_past(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Past and present of `cat([past, present], -2)`, where the past is an input."""
    parts = pair(value, -2, 2)
    return parts if parts is not None and parts[0].op == "placeholder" else None


def _read_early(total: fx.Node, node: fx.Node, value: object) -> bool:
    """Whether all keys or values are read before the attention, as Doge's mask is made of them.

    The operator gives them as a result, which cannot be read before it has run.
    """
    path: set[object] = set()
    while isinstance(value, fx.Node) and value is not total:
        path.add(value)
        value = value.args[0]
    return any(user < node and user not in path for user in total.users)


def _rewrite(graph: fx.Graph, found: _Attention) -> None:
    rows_out = _side_by_side(found.node)
    end = rows_out or found.node
    with graph.inserting_before(found.node):
        rows = [rows_of_heads(graph, part) for part in (found.q, found.k, found.v)]
        past = found.past or (None, None)
        sizes = (found.heads, found.kv_heads, found.scale)
        new = graph.call_function(ATTENTION, (*rows, found.mask, *past, *sizes))
        parts = [item(graph, new, index) for index in range(3)]
        y = parts[0] if rows_out is not None else heads_of_rows(graph, parts[0], found.heads)
    y.meta["val"] = end.meta.get("val")
    end.replace_all_uses_with(y)
    erase_unread([end])
    for total, part in zip(found.totals or (), parts[1:], strict=False):
        part.meta["val"] = total.meta.get("val")
        total.replace_all_uses_with(part, delete_user_cb=lambda user: not is_erased(user))
        erase_unread([total])
    erase_unread(parts)


def _side_by_side(node: fx.Node) -> fx.Node | None:
    """The node that holds the result as `[B, S, H · D]`, if the result has no other reader."""
    reader = only_reader(node)
    shape = shape_of(node)
    if reader is not None and reader.target in _VIEWS and shape_of(reader) == shape:
        reader = only_reader(reader)
    if reader is None or reader.target is not _ATEN.transpose.int or set(reader.args[1:]) != {1, 2}:
        return None
    reader = only_reader(reader)
    if reader is not None and reader.target is _ATEN.contiguous.default:
        reader = only_reader(reader)
    if reader is None or reader.target not in _VIEWS:
        return None
    return reader if len(shape_of(reader) or ()) == 3 else None

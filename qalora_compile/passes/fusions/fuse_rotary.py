"""fuse-rotary: one operator for rotary position embeddings that models write out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import shaped_graph
from qalora_compile.ir.spec import ROTARY_EMBEDDING
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.ir.torch_internals import is_erased
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import (
    call,
    heads_of_rows,
    only_reader,
    operands,
    pair,
    rows_of_heads,
    through,
)

_ATEN = torch.ops.aten
_ELEMENTWISE = (_ATEN.cos.default, _ATEN.sin.default)


@dataclass(frozen=True, kw_only=True)
class FuseRotary(Pass):
    """Replace a written-out rotation of halves.

    Before:  %1 = aten.mul.Tensor(%x, %cos)
             %2 = aten.slice.Tensor(%x, 3, 0, 8)
             %3 = aten.slice.Tensor(%x, 3, 8, …)
             %4 = aten.neg(%3)
             %5 = aten.cat([%4, %2], -1)
             %6 = aten.mul.Tensor(%5, %sin)
             %7 = aten.add.Tensor(%1, %6)
    After:   %7 = qalora.rotary_embedding(rows of %x, half of %cos, half of %sin, heads)

    with x `[B, H, S, D]` as rows of heads, `[B, S, H · D]`, and the result turned back.

    Fires on: that pattern where cos and sin, `[B, 1, S, R]`, are computed from two equal halves;
    also where only the first R values of a head are rotated and the others put behind them again.
    Leaves alone: rotations of neighbours, and tables of unknown origin.
    Exactness: the same products and sums.
    """

    name: ClassVar[str] = "fuse-rotary"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        graph = shaped_graph(program)
        halves = _Halves(graph)
        changes = []
        for node in list(graph.nodes):
            found = None if is_erased(node) else _match(node)
            if found is None:
                continue
            with graph.inserting_before(found.end):
                rows = rows_of_heads(graph, found.x)
                tables = halves.get(found.cos), halves.get(found.sin)
                turned = graph.call_function(ROTARY_EMBEDDING, (rows, *tables, found.heads))
                new = heads_of_rows(graph, turned, found.heads)
            new.meta["val"] = found.end.meta.get("val")
            found.end.replace_all_uses_with(new)
            erase_unread([found.end])
            changes.append(Change(turned.name, f"rotary embedding of {found.heads} heads"))
        reasons = [(node.name, _why_not(node)) for node in graph.nodes]
        skips = tuple(Change(name, "left as it is", why) for name, why in reasons if why)
        return PassResult(program.evolve(graph=graph), tuple(changes), skips)


def _why_not(node: fx.Node) -> str:
    """Why a sum of a value and its crossed halves is no rotation; empty where it is no such sum."""
    for straight, crossed in operands(node, _ATEN.add.Tensor):
        for x, cos in operands(straight, _ATEN.mul.Tensor):
            for turned, sin in operands(crossed, _ATEN.mul.Tensor):
                parts, inner = pair(turned, -1, 3), through(x)
                if parts is None or call(parts[0], _ATEN.neg.default) is None:
                    continue
                first = call(parts[1], _ATEN.slice.Tensor)
                if inner is None or first is None or through(first[0]) is not inner:
                    continue
                shape = shape_of(inner)
                if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
                    return "the number of heads is not known"
                if _table(cos) is None or _table(sin) is None:
                    return "cos and sin are not seen to be computed from two equal halves"
                return "what changes places is not the two halves of what is rotated"
    return ""


@dataclass(frozen=True)
class _Rotation:
    """x `[B, H, S, D]`, the tables `[B, S, R]`, and the node that holds the result."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    heads: int
    end: fx.Node


@dataclass
class _Halves:
    """The first half of each table, made once, where the table is."""

    graph: fx.Graph
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def get(self, table: fx.Node) -> fx.Node:
        """The half."""
        if table not in self.made:
            width = table.meta["val"].shape[-1]
            with self.graph.inserting_after(table):
                self.made[table] = self.graph.call_function(
                    _ATEN.slice.Tensor, (table, -1, 0, width // 2)
                )
        return self.made[table]


def _match(node: fx.Node) -> _Rotation | None:
    for straight, crossed in operands(node, _ATEN.add.Tensor):
        for x, cos in operands(straight, _ATEN.mul.Tensor):
            for turned, sin in operands(crossed, _ATEN.mul.Tensor):
                tables = _table(cos), _table(sin)
                inner = through(x)
                if inner is None or tables[0] is None or tables[1] is None:
                    continue
                shape = shape_of(inner) or ()
                fits = len(shape) == 4 and isinstance(shape[1], int)
                if fits and _is_rotated(turned, inner, tables[0]):
                    return _full_rotation(node, inner, tables[0], tables[1], int(shape[1]))
    return None


def _is_rotated(value: object, x: fx.Node, table: fx.Node) -> bool:
    """Whether `value` is `cat([−second half of x, first half of x])`."""
    width = table.meta["val"].shape[-1]
    parts = pair(value, -1, 3)
    second = call(parts[0], _ATEN.neg.default) if parts is not None else None
    return (
        parts is not None
        and second is not None
        and _slice(parts[1], x) == (0, width // 2)
        and _slice(second[0], x) == (width // 2, width)
    )


def _slice(value: object, x: fx.Node) -> tuple[int, int] | None:
    """Begin and end of a slice of x along its last axis."""
    found = call(value, _ATEN.slice.Tensor)
    width = (shape_of(x) or (0,))[-1]
    if found is None or through(found[0]) is not x or found[1] not in (-1, 3) or len(found) != 4:
        return None
    begin, end = found[2:]
    if not (isinstance(begin, int) and isinstance(end, int) and isinstance(width, int)):
        return None
    return begin, min(end, width)


def _table(value: object) -> fx.Node | None:
    """The table `[B, S, R]` behind `unsqueeze(table, 1)`, if its halves are equal."""
    found = call(value, _ATEN.unsqueeze.default)
    table = through(found[0]) if found is not None and found[1] == 1 else None
    return table if table is not None and _has_equal_halves(table) else None


def _has_equal_halves(table: fx.Node) -> bool:
    """Whether a value is computed, element by element, from `cat([f, f], -1)`."""
    node: fx.Node | None = table
    while node is not None:
        if node.target is _ATEN.cat.default:
            parts = pair(node, -1)
            return parts is not None and parts[0] is parts[1]
        scaled = node.target is _ATEN.mul.Tensor and isinstance(node.args[1], (int, float))
        if not scaled and node.target not in _ELEMENTWISE:
            return False
        node = through(node.args[0])
    return False


def _full_rotation(end: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, heads: int) -> _Rotation:
    """The rotation; where x is the first part of heads, and the rest follows, of whole heads."""
    found, reader = call(x, _ATEN.slice.Tensor), only_reader(end)
    source = through(found[0]) if found is not None else None
    parts = pair(reader, -1, 3) if reader is not None else None
    if source is not None and reader is not None and parts is not None and parts[0] is end:
        width, full = cos.meta["val"].shape[-1], (shape_of(source) or (0,))[-1]
        if _slice(x, source) == (0, width) and _slice(parts[1], source) == (width, full):
            return _Rotation(source, cos, sin, heads, reader)
    return _Rotation(x, cos, sin, heads, end)

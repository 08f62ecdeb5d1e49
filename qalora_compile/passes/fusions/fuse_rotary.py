"""fuse-rotary: one operator for rotary position embeddings in elementary operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.transformer_fusions import RotaryEmbedding
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.match import (
    Captured,
    Match,
    Op,
    Pattern,
    add,
    anchor,
    anything,
    const,
    either,
    match,
    mul,
    node,
    number,
    op,
)
from qalora_compile.passes.framework.rewrite import rewrite_matches
from qalora_compile.passes.fusions.head_layout import heads_of_rows, rows_of_heads

_ATEN = torch.ops.aten
_LAST = -1, 3

_TWICE = op(_ATEN.cat.default, tensors=(node("half"), node("half")), dim=-1)
_OF_EACH = either(
    op(_ATEN.cos.default, _ATEN.sin.default, self=node("inner")),
    op(_ATEN.mul.Tensor, self=node("inner"), other=number("factor")),
)


def _has_equal_halves(table: fx.Node) -> bool:
    """Whether a value is computed, element by element, from `cat([f, f], -1)`."""
    if isinstance(match(table, _TWICE), Match):
        return True
    found = match(table, _OF_EACH)
    return isinstance(found, Match) and _has_equal_halves(found["inner"])


def _table(name: str) -> Op:
    """The table `[B, S, R]` in `unsqueeze(table, 1)`, whose halves are equal."""
    unknown = "cos and sin are not seen to be computed from two equal halves"
    table = node(name).where(lambda m: _has_equal_halves(m[name]), unknown)
    return op(_ATEN.unsqueeze.default, self=table, dim=1).otherwise(unknown)


def _slice(x: Pattern, name: str) -> Op:
    """A slice of the values of each head."""
    bounds = {"dim": anything(), "start": anything(), "end": anything()}
    return op(_ATEN.slice.Tensor, self=x, **bounds).named(name)


def _width(x: fx.Node) -> int | str:
    return (shape_of(x) or (0,))[-1]


def _is(found: Captured, name: str, source: str, begin: int | str, end: int | str) -> bool:
    """Whether a slice of a captured source has these bounds, along the last axis."""
    dim, first, last = (argument(found[name], operand) for operand in ("dim", "start", "end"))
    sizes = first, last, _width(found[source])
    fits = dim in _LAST and all(isinstance(size, int) for size in sizes)
    return fits and (first, min(sizes[1:])) == (begin, end)


def _has_heads(found: Captured) -> bool:
    shape = shape_of(found["x"]) or ()
    return len(shape) == 4 and isinstance(shape[1], int)


def _are_halves(found: Captured) -> bool:
    width = _width(found["x"])
    if not isinstance(width, int):
        return False
    middle = width // 2
    return _is(found, "first", "x", 0, middle) and _is(found, "second", "x", middle, width)


def _rotation(x: Pattern) -> Op:
    """`x · cos + cat([−second half of x, first half of x]) · sin`."""
    crossed = (
        op(
            _ATEN.cat.default,
            tensors=(
                op(_ATEN.neg.default, self=_slice(x, "second")),
                _slice(x, "first").recognizable(),
            ),
            dim=const(*_LAST),
        )
        .where(_has_heads, "the number of heads is not known")
        .where(_are_halves, "what changes places is not the two halves of what is rotated")
    )
    return add(mul(x, _table("cos")), mul(anchor(crossed), _table("sin"))).named("rotated")


_PART = op(
    _ATEN.cat.default,
    tensors=(
        _rotation(_slice(node("source"), "x")).where(lambda m: len(m["rotated"].users) == 1),
        _slice(node("source"), "rest"),
    ),
    dim=const(*_LAST),
).where(
    lambda m: (
        _is(m, "x", "source", 0, _width(m["x"]))
        and _is(m, "rest", "source", _width(m["x"]), _width(m["source"]))
    )
)
"""The first values of each head are rotated, and the rest is appended again."""
_ALL = _rotation(node("x").otherwise("cos and the two halves belong to different values"))


@dataclass(frozen=True, kw_only=True)
class FuseRotary(Pass):
    """Fuse a rotation of halves in elementary operators.

    Before:  %1 = aten.mul.Tensor(%x, %cos)
             %2 = aten.slice.Tensor(%x, 3, 0, 8)
             %3 = aten.slice.Tensor(%x, 3, 8, …)
             %4 = aten.neg(%3)
             %5 = aten.cat([%4, %2], -1)
             %6 = aten.mul.Tensor(%5, %sin)
             %7 = aten.add.Tensor(%1, %6)
    After:   %7 = qalora.rotary_embedding(rows of %x, half of %cos, half of %sin, heads)

    with x `[B, H, S, D]` in rows, `[B, S, H · D]`, and the result with heads as an axis again.

    Fires on: this pattern where cos and sin, `[B, 1, S, R]`, are computed from two equal halves;
    also where only the first R values of a head are rotated and the others appended again.
    Leaves alone: rotations of interleaved pairs, and tables of unknown origin.
    Exactness: the same products and sums.
    """

    name: ClassVar[str] = "fuse-rotary"
    consumes: ClassVar[tuple[str, ...]] = ANY_STAGE
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Fuse."""
        halves, patterns = _Halves(), (_PART, _ALL)
        return rewrite_matches(program, patterns, lambda found: _rewrite(found, halves))


@dataclass
class _Halves:
    """The first half of each table, made once, right after the table."""

    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def get(self, table: fx.Node) -> fx.Node:
        """The half."""
        if table not in self.made:
            width = table.meta["val"].shape[-1]
            with table.graph.inserting_after(table):
                self.made[table] = table.graph.call_function(
                    _ATEN.slice.Tensor, (table, -1, 0, width // 2)
                )
        return self.made[table]


def _rewrite(found: Match, halves: _Halves) -> Change:
    end, x = found.node, found.captured.get("source", found["x"])
    heads = int((shape_of(x) or ())[1])
    with end.graph.inserting_before(end):
        tables = halves.get(found["cos"]), halves.get(found["sin"])
        rotated = RotaryEmbedding.create(end.graph, rows_of_heads(x), *tables, heads)
        new = heads_of_rows(rotated, heads)
    new.meta["val"] = end.meta.get("val")
    end.replace_all_uses_with(new)
    erase_unread([end])
    return Change(rotated.name, f"rotary embedding of {heads} heads")

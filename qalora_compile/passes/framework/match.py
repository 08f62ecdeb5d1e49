"""Declarative patterns over fx graphs, whose mismatch names the node that did not fit and why.

A pattern names the operands of operators as their schemas do:

    op(RSQRT, self=…)           a call of an operator; what is not named keeps its default
    add(a, b), mul(a, b)        a sum or product, its operands in either order
    node("x"), number("eps")    a value, captured; one name stands for one value throughout
    either(a, b)                alternatives
    const(-1, 3), or just -1    one of some constants
    anchor(a)                   where the search begins: what encloses it is found from its readers

Nodes that change nothing (`no_ops`) are skipped everywhere. `match` returns a `Match`, or a
`Mismatch`: the failure that got furthest. (onnxscript's rewriter matches ONNX graphs, not fx.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx

from qalora_compile.ir.ops.views import arguments
from qalora_compile.ir.torch_internals import schema_of
from qalora_compile.passes.framework.no_ops import readers, through

_ATEN = torch.ops.aten

Captured = Mapping[str, Any]
"""The captured values of a pattern, by name."""
Test = Callable[[Captured], bool]
Attempt = Callable[["State"], Iterator["State"]]


@dataclass(frozen=True)
class Match:
    """A part of a graph that matches a pattern.

    Attributes:
        node: The node that the outermost operator of the pattern matched.
        captured: Nodes, numbers and other captured values, by name.
    """

    node: fx.Node
    captured: Captured

    def __getitem__(self, name: str) -> Any:
        return self.captured[name]


@dataclass(frozen=True)
class Mismatch:
    """Why nothing matches: the failure that got furthest.

    Attributes:
        node: The node that does not fit.
        reason: Text without names of nodes, so that it is the same for all layers of a model.
        near: Whether the part that makes the pattern recognizable had matched.
        depth: How many operators had matched.
    """

    node: fx.Node
    reason: str
    near: bool = False
    depth: int = 0

    def __str__(self) -> str:
        return f"%{self.node.name}: {self.reason}"


@dataclass
class _Trace:
    """The failure that got furthest; the first of equal ones."""

    best: Mismatch | None = None

    def note(self, found: Mismatch | None) -> None:
        if found is not None and (
            self.best is None or (found.near, found.depth) > (self.best.near, self.best.depth)
        ):
            self.best = found


@dataclass(frozen=True)
class State:
    """The state of a search: the captured values, and the current node and operand."""

    node: fx.Node
    trace: _Trace
    captured: Captured = field(default_factory=dict)
    operand: str = ""
    depth: int = 0
    near: bool = False
    solved: tuple[Pattern, fx.Node] | None = None

    def fail(self, value: object, reason: str) -> None:
        """Record that `value` does not fit; an empty reason (of a guard) is not recorded."""
        if reason:
            at = value if isinstance(value, fx.Node) else self.node
            self.trace.note(Mismatch(at, reason, self.near, self.depth))


class Pattern:
    """A condition on a value. Patterns are immutable, and compared by identity."""

    def solve(self, value: object, state: State) -> Iterator[State]:
        """Each solution in which `value` fits, continued from `state`."""
        if state.solved is not None and state.solved[0] is self:
            if through(value) is state.solved[1]:
                yield state
        else:
            yield from self._solve(value, state)

    def _solve(self, value: object, state: State) -> Iterator[State]:
        raise NotImplementedError

    def children(self) -> Iterable[Pattern]:
        """The nested patterns."""
        return ()


P = TypeVar("P", bound="_Named")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Named(Pattern):
    """A pattern that captures what it matches, and may have further conditions."""

    name: str = ""
    tests: tuple[tuple[Test, str], ...] = ()
    missing: str = ""

    def named(self: P, name: str) -> P:
        """Capture the node."""
        return replace(self, name=name)

    def where(self: P, test: Test, reason: str = "") -> P:
        """Test the values captured so far; a test without a reason is a guard and not reported."""
        return replace(self, tests=(*self.tests, (test, reason)))

    def otherwise(self: P, reason: str) -> P:
        """Set the reason that is reported where the value is another."""
        return replace(self, missing=reason)

    def _finish(self, value: object, state: State) -> Iterator[State]:
        """Capture and test."""
        if self.name in state.captured and state.captured[self.name] is not value:
            state.fail(value, self.missing or f"another value stands where {self.name} is expected")
            return
        if self.name:
            state = replace(state, captured={**state.captured, self.name: value})
        for test, reason in self.tests:
            if not test(state.captured):
                state.fail(value, reason)
                return
        yield state


@dataclass(frozen=True, eq=False, kw_only=True)
class _Leaf(_Named):
    """A captured value of some type."""

    types: tuple[type, ...]

    def _solve(self, value: object, state: State) -> Iterator[State]:
        value = through(value) or value
        if isinstance(value, self.types):
            yield from self._finish(value, state)
        else:
            found = f"{_kind(value)} stands where {self.name} is expected"
            state.fail(value, self.missing or found)


@dataclass(frozen=True, eq=False)
class _Const(Pattern):
    values: tuple[object, ...]
    reason: str = ""

    def _solve(self, value: object, state: State) -> Iterator[State]:
        if any(value == wanted for wanted in self.values):
            yield state
            return
        found = f"{state.operand} is {'computed' if isinstance(value, fx.Node) else value}"
        wanted = " or ".join(map(str, self.values))
        state.fail(value, f"{self.reason} ({found})" if self.reason else f"{found}, not {wanted}")


@dataclass(frozen=True, eq=False)
class _Either(Pattern):
    alternatives: tuple[Pattern, ...]
    final: bool

    def _solve(self, value: object, state: State) -> Iterator[State]:
        return _any_of([partial(p.solve, value) for p in self.alternatives], state, self.final)

    def children(self) -> Iterable[Pattern]:
        return self.alternatives


@dataclass(frozen=True, eq=False)
class _List(Pattern):
    """A list of exactly so many values, as `cat` takes."""

    entries: tuple[Pattern, ...]

    def _solve(self, value: object, state: State) -> Iterator[State]:
        if isinstance(value, (list, tuple)) and len(value) == len(self.entries):
            parts = [(state.operand, *pair) for pair in zip(self.entries, value, strict=True)]
            return _all_of(parts, state)
        state.fail(value, f"{state.operand} are not {len(self.entries)}")
        return iter(())

    def children(self) -> Iterable[Pattern]:
        return self.entries


@dataclass(frozen=True, eq=False)
class _Anchor(Pattern):
    inner: Pattern

    def _solve(self, value: object, state: State) -> Iterator[State]:
        return self.inner.solve(value, state)


@dataclass(frozen=True, eq=False, kw_only=True)
class Op(_Named):
    """A call of one of some operators."""

    targets: tuple[object, ...]
    operands: Mapping[str, Pattern]
    swapped: tuple[str, ...] = ()
    near: bool = False

    @property
    def label(self) -> str:
        """The operators' names."""
        return " or ".join(str(target).removesuffix(".default") for target in self.targets)

    def swapping(self, first: str, second: str) -> Op:
        """Also match with two operands exchanged."""
        return replace(self, swapped=(first, second))

    def recognizable(self) -> Op:
        """Report failures from here on: this operator makes the pattern recognizable."""
        return replace(self, near=True)

    def children(self) -> Iterable[Pattern]:
        """The patterns of the operands."""
        return self.operands.values()

    def _solve(self, value: object, state: State) -> Iterator[State]:
        node = through(value)
        if node is None or node.target not in self.targets:
            found = f"{_kind(node or value)} stands where {self.label} is expected"
            state.fail(node or value, self.missing or found)
            return
        deeper = replace(state, node=node, depth=state.depth + 1, near=state.near or self.near)
        other = dict(zip(self.swapped, self.swapped[::-1], strict=True))
        orders = [self.operands, {other.get(n, n): p for n, p in self.operands.items()}]
        attempts = [partial(_solve_operands, order) for order in orders[: 2 if other else 1]]
        for solved in _any_of(attempts, deeper):
            yield from self._finish(node, replace(solved, node=node))


def _solve_operands(operands: Mapping[str, Pattern], state: State) -> Iterator[State]:
    """The operands that a pattern names, in its order (the order of matching); then the others."""
    given = arguments(state.node)
    rest = {
        a.name: _Const((a.default_value,))
        for a in schema_of(state.node.target).arguments  # type: ignore[arg-type]
        if a.has_default_value() and a.name not in operands
    }
    parts = [(name, pattern, given[name]) for name, pattern in {**operands, **rest}.items()]
    parts.sort(key=lambda part: state.solved is None or part[1] is not state.solved[0])
    return _all_of(parts, state)


def _all_of(parts: list[tuple[str, Pattern, object]], state: State) -> Iterator[State]:
    """Each solution in which all values match their patterns."""
    if not parts:
        yield state
        return
    (name, pattern, value), *rest = parts
    for found in pattern.solve(value, replace(state, operand=name)):
        yield from _all_of(rest, replace(found, node=state.node))


def _any_of(attempts: Iterable[Attempt], state: State, final: bool = False) -> Iterator[State]:
    """The solutions of several attempts; their failures are only recorded if all fail."""
    tried, fits = _Trace(), False
    for attempt in attempts:
        for found in attempt(replace(state, trace=tried)):
            fits = True
            yield replace(found, trace=state.trace)
        if fits and final:
            return
    if not fits:
        state.trace.note(tried.best)


def _kind(value: object) -> str:
    """A description of a value without its name."""
    if not isinstance(value, fx.Node):
        return "nothing" if value is None else f"the constant {value}"
    kinds = {"placeholder": "an input", "get_attr": "a tensor of the model", "output": "the output"}
    return kinds.get(value.op) or str(value.target).removesuffix(".default")


def op(*targets: object, **operands: object) -> Op:
    """A call of one of `targets`, whose operands are patterns, lists of them, or constants."""
    return Op(targets=targets, operands={name: _pattern(p) for name, p in operands.items()})


def _pattern(value: object) -> Pattern:
    if isinstance(value, Pattern):
        return value
    return _List(tuple(map(_pattern, value))) if isinstance(value, tuple) else const(value)


def add(first: Pattern, second: Pattern) -> Op:
    """A sum of two tensors, in either order."""
    return op(_ATEN.add.Tensor, self=first, other=second).swapping("self", "other")


def mul(first: Pattern, second: Pattern) -> Op:
    """A product of two tensors, in either order."""
    return op(_ATEN.mul.Tensor, self=first, other=second).swapping("self", "other")


def node(name: str) -> _Leaf:
    """Any node."""
    return _Leaf(name=name, types=(fx.Node,))


def number(name: str) -> _Leaf:
    """A Python number."""
    return _Leaf(name=name, types=(int, float))


def anything(name: str = "") -> _Leaf:
    """Any operand: a node, a constant, or none."""
    return _Leaf(name=name, types=(object,))


def const(*values: object, otherwise: str = "") -> Pattern:
    """One of some constants; `otherwise` is the reason reported for another."""
    return _Const(values, otherwise)


def either(*alternatives: Pattern, final: bool = False) -> Pattern:
    """The first that matches; unless `final`, later ones are tried if the rest does not match."""
    return _Either(alternatives, final)


def anchor(inner: Pattern) -> Pattern:
    """The place where the search for a pattern begins."""
    return _Anchor(inner)


def match(at: fx.Node, *patterns: Pattern) -> Match | Mismatch:
    """The first of some patterns that matches at a node, or why the last does not.

    The node has to match the anchor of a pattern, or the pattern itself if it has none.
    """
    trace = _Trace()
    for pattern in patterns:
        trace = _Trace()
        for found in _climb(_path(pattern) or [pattern], at, State(at, trace)):
            return Match(found.node, found.captured)
    return trace.best or Mismatch(at, "nothing fits")


def _path(pattern: Pattern) -> list[Pattern]:
    """The anchor, and the operators around it from the inside; empty where there is none."""
    if isinstance(pattern, _Anchor):
        return [pattern]
    path = next(filter(None, map(_path, pattern.children())), [])
    return [*path, pattern] if path and isinstance(pattern, Op) else path


def _climb(path: list[Pattern], at: fx.Node, state: State) -> Iterator[State]:
    """Solve the first of `path` at a node, and each further one at a reader of the one before."""
    inner, *outer = path
    for found in inner.solve(at, state):
        place = through(at) or at
        if not outer:
            yield replace(found, node=place)
            continue
        above = outer[0]
        assert isinstance(above, Op)
        there = [reader for reader in readers(place) if reader.target in above.targets]
        if not there:
            kinds = " and ".join(sorted({_kind(reader) for reader in readers(place)})) or "nothing"
            wanted = above.missing or f"no {above.label} reads it"
            found.fail(place, f"{wanted}, only {kinds}")
        below = replace(found, node=place, solved=(inner, place))
        yield from _any_of([partial(_climb, outer, reader) for reader in there], below)

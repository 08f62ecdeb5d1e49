"""Proves the same element at every index of two values, and lists what that depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.symbolic.evaluate import NOT_FITTING, Evaluation
from qalora_compile.verify.proof.symbolic.expression import (
    FUNCTION,
    LEAF,
    MASKED,
    NUMBER,
    REDUCED,
    SUM,
    WHERE,
    ZERO,
    Expr,
)
from qalora_compile.verify.proof.symbolic.normalize import Normalizer, TooLargeError
from qalora_compile.verify.proof.symbolic.ordering import TIES, OfTensor, is_order
from qalora_compile.verify.proof.symbolic.polynomial import (
    Poly,
    as_poly,
    of_atom,
    size,
    variable,
)
from qalora_compile.verify.proof.symbolic.roots import SQUARED, is_root
from qalora_compile.verify.proof.symbolic.tensor import ONE_ELEMENT, TooShortError, UnprovableError

PAST, SEQUENCE, TOTAL = "past_sequence", "sequence", "total_sequence"
CACHED = f"axis 1 of attention_mask has {PAST} + {SEQUENCE} elements"
ALLOWED = "in each row of attention the mask allows at least one key (other rows have no value)"
FINITE = (
    f"scores are small next to the numbers below {MASKED:g} that the mask adds, so that these "
    "stand for -∞"
)
_LEAST = (1, 16, 256, 4096)
"""Sizes of axes that are assumed, one after the other, where a slice needs some elements."""
_OF_BATCH = {PAST: 0, "batch": 1}
"""Axes of which no more is assumed."""
Sites = Mapping[str, tuple[str, Any, int, int]]


class SymbolicProof:
    """Compares values of two graphs whose sites are equal.

    Args:
        graphs: The graphs.
        sites: For each graph, value → name of the site, the operand it reads, N and K.
    """

    def __init__(self, graphs: tuple[Graph, Graph], sites: tuple[Sites, Sites]) -> None:
        self._graphs, self._sites = graphs, sites
        self._evaluations = cache(self._evaluated)

    def _evaluated(self, least: int) -> tuple[list[Evaluation], tuple[str, ...]]:
        """The values of both graphs, and what their shapes depend on."""
        described = next((graph for graph in self._graphs if graph.shapes), self._graphs[0])
        names = {s for shape in described.shapes.values() for s in shape if isinstance(s, str)}
        most = described.most if least else {}
        smallest = {name: min(least, _OF_BATCH.get(name, least)) for name in names}
        known = {name: size(name, least=smallest[name], most=most.get(name)) for name in names}
        conditions = [text for graph in self._graphs for text in graph.assumed]
        if names >= {PAST, SEQUENCE, TOTAL} and "attention_mask" in described.shapes:
            known[TOTAL] = known[PAST] + known[SEQUENCE]
            conditions.append(CACHED)
        if least:
            axes = " and ".join(sorted(names - {PAST, TOTAL}))
            conditions.append(f"the axes {axes} have at least 1 element")
            longer = sorted(name for name in names - {TOTAL} if smallest[name] > 1)
            conditions += [f"the axis {name} has at least {least} elements" for name in longer]
            limited = sorted(names & most.keys())
            conditions += [f"the axis {name} has at most {most[name]} elements" for name in limited]
        shapes = {
            name: tuple(as_poly(s) if isinstance(s, int) else known[s] for s in shape)
            for name, shape in described.shapes.items()
        }
        halves = self._graphs[0].half != self._graphs[1].half
        pairs = zip(self._graphs, self._sites, strict=True)
        values = [Evaluation(graph, shapes, each, halves=halves) for graph, each in pairs]
        return values, tuple(conditions)

    def conditions(self, targets: tuple[Any, Any]) -> tuple[str, ...]:
        """What two values are equal under; that axes are not empty only where it is needed.

        Raises:
            UnprovableError: they are not shown to be equal; the text says why.
        """
        return self._assuming(targets, (0, *_LEAST))

    def _assuming(self, targets: tuple[Any, Any], sizes: tuple[int, ...]) -> tuple[str, ...]:
        """As `conditions`, with the first of these sizes of axes under which there is a proof."""
        least, *others = sizes
        try:
            return self._proved(targets, least)
        except TooShortError:
            if not others:
                raise
        except UnprovableError:
            if least:
                raise
        return self._assuming(targets, (*others,))

    def _proved(self, targets: tuple[Any, Any], least: int) -> tuple[str, ...]:
        values, conditions = self._evaluations(least)
        one, other = (v.of(target) for v, target in zip(values, targets, strict=True))
        if one.shape != other.shape or one.dtype != other.dtype:
            raise UnprovableError(f"shapes {list(one.shape)} and {list(other.shape)}")
        index = tuple(map(_index, range(one.rank), one.shape))
        try:
            elements = one[index], other[index]
        except NOT_FITTING as error:
            raise UnprovableError(f"operands that do not fit: {error!r}") from error
        normal = Normalizer()
        try:
            forms = [normal.of(element) for element in elements]
        except TooLargeError as error:
            raise UnprovableError("there are too many cases to compare") from error
        if forms[0] is not forms[1]:
            raise UnprovableError("their elements are not shown to be equal")
        return (*conditions, *_needed(elements, forms[0]))


def _index(axis: int, count: Poly) -> Poly:
    return as_poly(0) if count is ONE_ELEMENT else of_atom(variable(f"i{axis}", count))


def _needed(elements: tuple[Expr, Expr], form: Expr) -> Iterator[str]:
    """The conditions that the meaning of masks depends on."""
    if any(_is_empty_sum(part) for part in _parts(form)):
        yield ALLOWED
    if any(_stands_for_infinity(part) for element in elements for part in _parts(element)):
        yield FINITE
    if any(is_order(part) for part in _parts(form)):
        yield TIES
    if any(is_root(part) for element in elements for part in _parts(element)):
        yield SQUARED


def _is_empty_sum(value: Expr) -> bool:
    """Whether it divides by a sum of which every term may be 0."""
    if value.op != FUNCTION or value.detail != "inverse" or value.operand.op != REDUCED:
        return False
    return any(part.op == WHERE and ZERO in part.args for part in _parts(value.operand.operand))


def _stands_for_infinity(value: Expr) -> bool:
    found = value.detail if value.op == NUMBER else value.detail[0] if value.op == SUM else 0.0
    return -float("inf") < found <= MASKED


def _parts(value: Expr) -> Iterator[Expr]:
    waiting, seen = [value], {value}
    while waiting:
        here = waiting.pop()
        yield here
        for arg in (*here.args, *_inside(here)):
            if arg not in seen:
                seen.add(arg)
                waiting.append(arg)


def _inside(value: Expr) -> Iterator[Expr]:
    """The elements of tensors that indices or names of functions depend on."""
    if value.op == LEAF and isinstance(value.detail[0], OfTensor):
        yield from value.detail[0].forms
    for atom in value.atoms:
        if atom.kind == "data":
            yield atom.first

"""Scalar expressions in normal form; equal expressions are the same object.

Numbers, elements of tensors, sums, products, functions without a rule, case distinctions, and sums
or maxima over a bound index. Conditions are expressions too: `true`, `false`, an integer
inequality, the truth of an element, or a case distinction between these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qalora_compile.verify.proof.symbolic.arithmetic import holds
from qalora_compile.verify.proof.symbolic.polynomial import (
    Atom,
    Poly,
    as_poly,
    of_atom,
)

NUMBER, INTEGER, LEAF, SUM, PRODUCT, FUNCTION = "num", "int", "leaf", "sum", "product", "fn"
WHERE, REDUCED, TRUTH, LINEAR = "where", "reduced", "truth", "linear"
MAX = "max"
INFINITE = float("inf")
_EXACT = 1 << 24
"""float32 holds every integer up to this one."""
MASKED = -1e30
"""Numbers below this one stand for -∞ in a mask."""


class Expr:
    """An expression; made by the functions below.

    Attributes:
        op: Its kind.
        detail: A number, polynomial, name, or (for `reduced`) kind, index and count.
        args: Operands. Of a sum and a product, each has a factor or exponent in `detail`.
        number: Order of creation, which orders operands.
        conditions: The conditions inside that a case distinction may assume.
        atoms: All atoms of polynomials inside.
        height: How deeply bound indices are nested.
    """

    __slots__ = ("args", "atoms", "conditions", "detail", "height", "number", "op")
    atoms: frozenset[Atom]
    conditions: frozenset[Expr]
    height: int

    def __init__(self, op: str, detail: Any, args: tuple[Expr, ...], number: int) -> None:
        self.op, self.detail, self.args, self.number = op, detail, args, number
        atoms = frozenset[Atom]().union(*(a.atoms for a in args), *map(atoms_of, _polys(detail)))
        found = frozenset[Expr]().union(*(a.conditions for a in args))
        inside = [atom.first.height for atom in atoms if atom.kind == "data"]
        self.height = max([a.height for a in args] + inside, default=0)
        if op in (TRUTH, LINEAR):
            found |= {self}
        if op == REDUCED:
            bound = detail[1]
            atoms -= {bound}
            found = frozenset(c for c in found if bound not in c.atoms)
            self.height += 1
        self.atoms, self.conditions = atoms, found

    @property
    def operand(self) -> Expr:
        """The first operand."""
        found, *_ = self.args
        return found

    def __lt__(self, other: Expr) -> bool:
        return self.number < other.number

    def __repr__(self) -> str:
        inside = ", ".join(map(repr, self.args))
        return f"{self.op}[{self.detail}]({inside})" if self.args else f"{self.op}[{self.detail}]"


def _polys(detail: Any) -> Iterable[Poly]:
    if isinstance(detail, Poly):
        return (detail,)
    if isinstance(detail, tuple):
        return (part for part in detail if isinstance(part, Poly))
    return ()


def atoms_of(value: Poly) -> frozenset[Atom]:
    """The atoms of a polynomial, and those inside of quotients and elements."""
    found = set(value.atoms)
    for atom in value.atoms:
        if atom.kind == "div":
            found |= frozenset[Atom]().union(*map(atoms_of, atom.args))
        elif atom.kind == "data":
            found |= atom.first.atoms
    return frozenset(found)


_MADE: dict[tuple[Any, ...], Expr] = {}


def _make(op: str, detail: Any, args: tuple[Expr, ...] = ()) -> Expr:
    key = (op, detail, args)
    found = _MADE.get(key)
    if found is None:
        found = _MADE[key] = Expr(op, detail, args, len(_MADE))
    return found


def number(value: float) -> Expr:
    """A number, as float32 holds it: that is how ONNX stores numbers."""
    with np.errstate(over="ignore"):
        short = float(np.float32(value))
    return _make(NUMBER, 0.0 if short == 0 else short)


ZERO, ONE = number(0), number(1)
TRUE, FALSE = _make("true", None), _make("false", None)


def integer(value: Poly | int) -> Expr:
    """An integer that is known as a polynomial."""
    value = as_poly(value)
    known = value.constant
    return _make(INTEGER, value) if known is None or abs(known) > _EXACT else number(known)


def as_integer(value: Expr) -> Poly | None:
    """The polynomial of an integer; None if its value is not known as one."""
    if value.op == INTEGER:
        found: Poly = value.detail
        return found
    if value.op == NUMBER and float(value.detail).is_integer():
        return as_poly(int(value.detail))
    return None


def index_of(value: Expr) -> Poly:
    """An integer as an index; one that tensors hold becomes an atom."""
    known = as_integer(value)
    if known is not None:
        return known
    return of_atom(Atom(f"data{value.number}", "data", (value,)))


def leaf(name: str, indices: Sequence[Poly]) -> Expr:
    """An element of a tensor."""
    return _make(LEAF, (name, *indices))


def add(*parts: Expr) -> Expr:
    """A sum: nested sums are flattened, and equal operands counted."""
    factors: dict[Expr, float] = {}
    total, known = 0.0, as_poly(0)
    for part in parts:
        for one, factor in _summands(part):
            if one.op == NUMBER:
                total += one.detail * factor
            elif one.op == INTEGER and factor == int(factor):
                known = known + one.detail * int(factor)
            else:
                factors[one] = factors.get(one, 0.0) + factor
    if total == -INFINITE:
        return number(total)
    if abs(total) < _EXACT and total == int(total):
        known, total = known + int(total), 0.0
    if known.constant is None:
        factors[integer(known)] = 1.0
    else:
        total += known.constant
    return _sum(total, sorted((one, factor) for one, factor in factors.items() if factor))


def _sum(total: float, terms: Sequence[tuple[Expr, float]]) -> Expr:
    if not terms:
        return number(total)
    if total == 0 and len(terms) == 1:
        return mul(number(terms[0][1]), terms[0][0])
    detail = (number(total).detail, *(number(factor).detail for _, factor in terms))
    return _make(SUM, detail, tuple(one for one, _ in terms))


def _summands(value: Expr) -> Iterable[tuple[Expr, float]]:
    if value.op == SUM:
        yield ONE, value.detail[0]
        yield from zip(value.args, value.detail[1:], strict=True)
    elif value.op == PRODUCT:
        rest = _make_product(1.0, list(zip(value.args, value.detail[1:], strict=True)))
        yield rest, value.detail[0]
    else:
        yield value, 1.0


def _scaled(value: Expr, factor: float) -> Expr:
    return mul(number(factor), value)


def mul(*parts: Expr) -> Expr:
    """A product: nested products are flattened; a number is distributed over a sum."""
    factor, known, powers = 1.0, as_poly(1), dict[Expr, int]()
    for one, power in (pair for part in parts for pair in _factors(part)):
        if one.op == NUMBER:
            factor *= one.detail**power
        elif one.op == INTEGER:
            for _ in range(power):
                known = known * one.detail
        else:
            lead = _common_factor(one)
            rest = one if lead == 1 else _divided(one, lead)
            factor *= lead**power
            powers[rest] = powers.get(rest, 0) + power
    if factor == 0:
        return ZERO
    if known.constant is not None:
        factor *= known.constant
    else:
        exact = factor == int(factor)
        powers[integer(known * int(factor) if exact else known)] = 1
        factor = 1.0 if exact else factor
    return _make_product(factor, sorted(powers.items()))


def _common_factor(value: Expr) -> float:
    """The first factor of a sum, if its number and all factors are exact multiples of it."""
    if value.op != SUM:
        return 1.0
    lead: float = value.detail[1]
    shares = [factor / lead for factor in value.detail]
    exact = (number(s).detail * lead == f for s, f in zip(shares, value.detail, strict=True))
    return lead if all(exact) else 1.0


def _divided(value: Expr, factor: float) -> Expr:
    return _make(SUM, tuple(number(f / factor).detail for f in value.detail), value.args)


def _factors(value: Expr) -> Iterable[tuple[Expr, int]]:
    if value.op == PRODUCT:
        yield number(value.detail[0]), 1
        yield from zip(value.args, value.detail[1:], strict=True)
    else:
        yield value, 1


def _make_product(factor: float, powers: Sequence[tuple[Expr, int]]) -> Expr:
    factor = number(factor).detail
    if not powers:
        return number(factor)
    one, power = powers[0]
    if len(powers) == 1 and power == 1:
        if factor == 1:
            return one
        if one.op == SUM:
            scaled = [number(f * factor).detail for f in one.detail]
            return _make(SUM, tuple(scaled), one.args)
    detail = (factor, *(power for _, power in powers))
    return _make(PRODUCT, detail, tuple(one for one, _ in powers))


def function(name: str, *args: Expr) -> Expr:
    """A function of which nothing is known but its name."""
    return _make(FUNCTION, name, args)


def exponential(value: Expr) -> Expr:
    """e^x; 0 for -∞ and for numbers that stand for it."""
    offset = value.detail if value.op == NUMBER else value.detail[0] if value.op == SUM else 0.0
    return ZERO if offset <= MASKED else ONE if value is ZERO else function("exp", value)


def inverse(value: Expr) -> Expr:
    """1 / x."""
    if value.op == NUMBER and value.detail:
        return number(1.0 / value.detail)
    return function("inverse", value)


def linear(value: Poly) -> Expr:
    """The condition value ≥ 0."""
    if holds(value):
        return TRUE
    if holds(as_poly(-1) - value):
        return FALSE
    first = next(factor for monomial, factor in value.terms if monomial)
    if first > 0:
        return _make(LINEAR, value)
    return negated(_make(LINEAR, as_poly(-1) - value))


def truth(value: Expr) -> Expr:
    """The condition that an element is true, or not 0."""
    if value.op in ("true", "false", TRUTH, LINEAR):
        return value
    if value.op == WHERE:
        condition, then, other = value.args
        return where(condition, truth(then), truth(other))
    if value.op == NUMBER:
        return FALSE if value.detail == 0 else TRUE
    return _make(TRUTH, None, (value,))


def where(condition: Expr, then: Expr, other: Expr) -> Expr:
    """A case distinction."""
    if condition is TRUE or then is other:
        return then
    if condition is FALSE:
        return other
    if _is_nan(condition, other) and has_value(other):
        return other
    if condition.op == WHERE:
        first, *rest = condition.args
        return where(first, where(rest[0], then, other), where(rest[1], then, other))
    return _make(WHERE, None, (condition, then, other))


def is_nan(value: Expr) -> Expr:
    """The condition that an element is not a number."""
    if value.op in (INTEGER, NUMBER):
        return FALSE
    return _truth_of("isnan", value)


def _is_nan(condition: Expr, value: Expr) -> bool:
    """Whether a condition is that this value is not a number."""
    return condition.op == TRUTH and condition.operand is function("isnan", value)


def has_value(value: Expr) -> bool:
    """Whether it is a share of a softmax: e^x over sums of such, a number in rows with any key."""
    if value.op == WHERE:
        _, *cases = value.args
        return all(map(has_value, cases))
    if value.op == PRODUCT:
        return all(map(has_value, value.args))
    if value.op == FUNCTION and value.detail == "inverse":
        total = value.operand
        return total.op == REDUCED and total.detail[0] == SUM and has_value(total.operand)
    return value is ZERO or (value.op == FUNCTION and value.detail == "exp")


def negated(condition: Expr) -> Expr:
    """Not a condition."""
    return where(condition, FALSE, TRUE)


def both(one: Expr, other: Expr) -> Expr:
    """One condition and another."""
    return where(one, other, FALSE)


def _truth_of(name: str, *args: Expr) -> Expr:
    return _make(TRUTH, None, (function(name, *args),))


def compare(one: Expr, other: Expr) -> Expr:
    """The condition one ≤ other."""
    low, high = as_integer(one), as_integer(other)
    if low is not None and high is not None:
        return linear(high - low)
    return _truth_of("≤", one, other)


def equal(one: Expr, other: Expr) -> Expr:
    """The condition one = other."""
    low, high = as_integer(one), as_integer(other)
    if low is not None and high is not None:
        return both(linear(high - low), linear(low - high))
    if one is other:
        return TRUE
    return _truth_of("=", *sorted((one, other)))


def reduced(kind: str, index: Atom, body: Expr) -> Expr:
    """The `sum` or `max` of a body over an index."""
    return _make(REDUCED, (kind, index), (body,))


def rebuilt(value: Expr, args: Sequence[Expr]) -> Expr:
    """An expression with other operands."""
    if value.op == SUM:
        scaled = [_scaled(a, f) for a, f in zip(args, value.detail[1:], strict=True)]
        return add(number(value.detail[0]), *scaled)
    if value.op == PRODUCT:
        powers = [a for a, p in zip(args, value.detail[1:], strict=True) for _ in range(p)]
        return mul(number(value.detail[0]), *powers)
    if value.op == FUNCTION:
        makers: dict[str, Callable[..., Expr]] = {
            "exp": exponential, "inverse": inverse, "≤": compare, "=": equal
        }  # fmt: skip
        make = makers.get(value.detail)
        return function(value.detail, *args) if make is None else make(*args)
    if value.op == WHERE:
        return where(*args)
    if value.op == TRUTH:
        return truth(*args)
    return _make(value.op, value.detail, tuple(args)) if args else value

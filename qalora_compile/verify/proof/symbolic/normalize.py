"""The normal form of expressions with case distinctions and sums over indices.

Case distinctions move outward, up to the sum whose index they read, and are asked in one order;
what the ranges of indices and earlier answers decide is not asked. Factors without the index move
out of its sum, and bound indices are numbered from the inside.
"""

from __future__ import annotations

from qalora_compile.verify.proof.symbolic.arithmetic import holds
from qalora_compile.verify.proof.symbolic.change import Change
from qalora_compile.verify.proof.symbolic.expression import (
    FALSE,
    LINEAR,
    ONE,
    PRODUCT,
    REDUCED,
    SUM,
    TRUE,
    TRUTH,
    WHERE,
    Expr,
    integer,
    mul,
    number,
    rebuilt,
    reduced,
    truth,
    where,
)
from qalora_compile.verify.proof.symbolic.polynomial import Atom, Poly, as_poly, of_atom, variable
from qalora_compile.verify.proof.symbolic.roots import squared

Facts = tuple[Poly, ...]


class TooLargeError(Exception):
    """An expression has more cases than are compared."""


class Normalizer:
    """Makes normal forms; keeps those that it has made.

    Args:
        most: The largest number of expressions to visit before it gives up.
    """

    def __init__(self, most: int = 20000) -> None:
        self._done: dict[tuple[Expr, Facts, int], Expr] = {}
        self._most = most

    def of(self, value: Expr, facts: Facts = (), depth: int = 0) -> Expr:
        """The normal form under facts (each ≥ 0), inside of `depth` sums.

        Raises:
            TooLargeError: there are too many cases.
        """
        key = (value, facts, depth)
        found = self._done.get(key)
        if found is None:
            if len(self._done) > self._most:
                raise TooLargeError
            found = self._done[key] = self._made(value, facts, depth)
        return found

    def _made(self, value: Expr, facts: Facts, depth: int) -> Expr:
        value = _resolved(value, facts) if facts else value
        normal = set[Expr]()
        while value.conditions:
            first = min(value.conditions, key=_order)
            if first.op == TRUTH and first not in normal:
                form = truth(self.of(first.operand, facts, depth))
                normal |= form.conditions
                value = Change({first: form}, {}).of(value)
                continue
            known = _decided(first, facts)
            if known is None:
                then, other = (
                    self.of(
                        Change({first: side}, {}).of(value), self._with(facts, first, side), depth
                    )
                    for side in (TRUE, FALSE)
                )
                return self._needed(first, then, other, facts, depth)
            value = Change({first: known}, {}).of(value)
        if value.op == REDUCED:
            return self._sum(value, facts, depth)
        return squared(rebuilt(value, [self.of(arg, facts, depth) for arg in value.args]))

    def _needed(self, condition: Expr, then: Expr, other: Expr, facts: Facts, depth: int) -> Expr:
        """A case distinction, or one of its cases if that is right in the other one too."""
        if condition.op == LINEAR and len(condition.atoms) > 1:
            for one, side, rest in ((other, TRUE, then), (then, FALSE, other)):
                under = self._with(facts, condition, side)
                if one.conditions and self.of(one, under, depth) is rest:
                    return one
        return where(condition, then, other)

    def _with(self, facts: Facts, condition: Expr, side: Expr) -> Facts:
        if condition.op != LINEAR:
            return facts
        fact = condition.detail if side is TRUE else as_poly(-1) - condition.detail
        return tuple(sorted({*facts, fact}, key=lambda p: p.name))

    def _sum(self, value: Expr, facts: Facts, depth: int) -> Expr:
        kind, bound = value.detail
        count = bound.first
        level = variable(f"r{depth}", count)
        body = self.of(_renamed(value.operand, bound, level), facts, depth + 1)
        outside, inside = _factored(body, level) if kind == SUM else (ONE, body)
        if kind == SUM and level not in inside.atoms:
            return mul(outside, inside, integer(count))
        named = variable(f"b{inside.height + 1}", count)
        return mul(outside, reduced(kind, named, _renamed(inside, level, named)))


def _resolved(value: Expr, facts: Facts) -> Expr:
    """With the quotients that facts decide: of an index in a part of a concatenation."""
    known = {atom: _quotient(atom, facts) for atom in value.atoms if atom.kind == "div"}
    found = {atom: as_poly(q) for atom, q in known.items() if q is not None}
    return Change({}, found).of(value) if found else value


def _quotient(atom: Atom, facts: Facts) -> int | None:
    dividend, divisor = atom.args
    for found in (0, -1):
        rest = dividend - divisor * found
        if holds(rest, facts) and holds(divisor - 1 - rest, facts):
            return found
    return None


def _renamed(value: Expr, old: Atom, new: Atom) -> Expr:
    return Change({}, {old: of_atom(new)}).of(value)


def _order(condition: Expr) -> tuple[bool, str, int]:
    is_linear = condition.op == LINEAR  # first: they may decide others
    return not is_linear, condition.detail.name if is_linear else "", condition.number


def _decided(condition: Expr, facts: Facts) -> Expr | None:
    if condition.op != LINEAR:
        return None
    if holds(condition.detail, facts):
        return TRUE
    return FALSE if holds(as_poly(-1) - condition.detail, facts) else None


def _factored(body: Expr, index: Atom) -> tuple[Expr, Expr]:
    """The factors of a product, or common to all cases, that do not read an index; and the rest."""
    common = [one for one in _factors(body) if index not in one.atoms]
    scale = _scale(body)
    if not common and scale in (None, 1):
        return ONE, body
    known = 1.0 if scale is None else scale
    return mul(number(known), *common), _divided(body, common, known)


def _scale(body: Expr) -> float | None:
    """The number that all cases are multiplied by; None if all are 0."""
    if _is_zero(body):
        return None
    if body.op == WHERE:
        _, *cases = body.args
        found = {_scale(case) for case in cases} - {None}
        return found.pop() if len(found) == 1 else 1.0
    return float(body.detail[0]) if body.op == PRODUCT else 1.0


def _factors(body: Expr) -> list[Expr]:
    if body.op == WHERE:
        _, then, other = body.args
        cases = [case for case in (then, other) if not _is_zero(case)]
        if not cases:
            return []
        rest = [_factors(case) for case in cases[1:]]
        return [one for one in _factors(cases[0]) if all(one in case for case in rest)]
    if body.op == PRODUCT:
        powers = zip(body.args, body.detail[1:], strict=True)
        return [one for one, power in powers if power == 1]
    return []


def _is_zero(value: Expr) -> bool:
    return value.op == "num" and value.detail == 0


def _divided(body: Expr, common: list[Expr], scale: float) -> Expr:
    if _is_zero(body):
        return body
    if body.op == WHERE:
        condition, *cases = body.args
        return where(condition, *(_divided(case, common, scale) for case in cases))
    if body.op != PRODUCT:  # without common factors
        return body
    powers = zip(body.args, body.detail[1:], strict=True)
    kept = [one for one, power in powers if one not in common for _ in range(power)]
    return mul(number(body.detail[0] / scale), *kept)

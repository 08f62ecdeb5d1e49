"""Decides inequalities between linear integer terms, by Fourier-Motzkin elimination.

Products of atoms count as unknowns of their own. An answer "yes" is a proof; "no" only says that
there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import gcd

from qalora_compile.verify.proof.symbolic.polynomial import (
    Atom,
    Monomial,
    Poly,
    as_poly,
    divided,
    of_atom,
    poly,
)

_LARGEST = 200
"""Inequalities at which elimination gives up."""


def holds(value: Poly, facts: tuple[Poly, ...] = ()) -> bool:
    """Whether value ≥ 0 follows from facts (each ≥ 0) and from the ranges of all atoms."""
    known = value.constant
    if known is not None:
        return known >= 0
    return _follows(value, facts)


@lru_cache(maxsize=1 << 16)
def _follows(value: Poly, facts: tuple[Poly, ...]) -> bool:
    """Value ≥ 0 follows if value ≤ -1 contradicts the facts."""
    return is_contradiction([as_poly(-1) - value, *facts])


def is_contradiction(facts: Sequence[Poly]) -> bool:
    """Whether the facts, each ≥ 0, cannot hold together with the ranges of their atoms."""
    return _eliminated({_tight(fact) for fact in (*facts, *_ranges(facts))})


def _ranges(facts: Iterable[Poly]) -> list[Poly]:
    """The ranges of all atoms in facts, and of the atoms in these ranges."""
    waiting = [(atom, monomial) for f in facts for monomial, _ in f.terms for atom in monomial]
    found: dict[Poly, None] = {}
    seen: set[tuple[Atom, Monomial]] = set()
    while waiting:
        atom, monomial = waiting.pop()
        if (atom, monomial) in seen:
            continue
        seen.add((atom, monomial))
        rows = _range(atom)
        if len(monomial) > 1 and atom.kind != "div":
            # Each bound times the other factors, which must not be negative. Those of a quotient
            # contain it times its divisor, so they would not come to an end.
            others = list(monomial)
            others.remove(atom)
            if not all(_is_natural(other) for other in others):
                continue
            factor = poly({tuple(others): 1})
            rows = [row * factor for row in rows]
        for row in rows:
            if row not in found:
                found[row] = None
                waiting += [(a, m) for m, _ in row.terms for a in m]
    return list(found)


def _is_natural(atom: Atom) -> bool:
    return atom.kind in ("size", "var")


def _range(atom: Atom) -> list[Poly]:
    value = of_atom(atom)
    if atom.kind == "size":
        least, *largest = atom.args
        return [value - least, *(most - value for most in largest)]
    if atom.kind == "var":
        return [value, atom.first - 1 - value]
    if atom.kind == "div":  # there is an element, so the divisor, an axis, is at least 1
        dividend, divisor = atom.args
        left = dividend - value * divisor
        return [left, divisor - 1 - left, *_range_of_quotient(value, dividend, divisor)]
    if atom.kind == "data":  # a place in an order has a count
        _, *counts = atom.args
        return [row for count in counts for row in (value, count - 1 - value)]
    return []


def _range_of_quotient(value: Poly, dividend: Poly, divisor: Poly) -> list[Poly]:
    """At least 0 if the dividend is; less than m for an index that is less than m divisors."""
    rows = [value] if holds(dividend) else []
    only = dividend.terms[0][0] if len(dividend.terms) == 1 and dividend.terms[0][1] == 1 else ()
    if len(only) == 1 and only[0].kind == "var":
        multiple, rest = divided(only[0].first, divisor)
        if not rest.terms:
            rows.append(multiple - 1 - value)
    return rows


def _tight(value: Poly) -> Poly:
    """A fact divided by the common divisor of its coefficients, its constant rounded down."""
    factors = [factor for monomial, factor in value.terms if monomial]
    common = gcd(*factors) if factors else 1
    if common <= 1:
        return value
    return poly({monomial: factor // common for monomial, factor in value.terms})


def _eliminated(facts: set[Poly]) -> bool:
    """Whether elimination of all unknowns leaves a negative constant."""
    while True:
        rows = list(facts)
        for row in rows:
            known = row.constant
            if known is not None and known < 0:
                return True
        counts: dict[Monomial, list[int]] = {}
        for row in rows:
            for monomial, factor in row.terms:
                if monomial:
                    counts.setdefault(monomial, [0, 0])[factor > 0] += 1
        if not counts or len(rows) > _LARGEST:
            return False
        chosen = min(counts, key=lambda m: (counts[m][0] * counts[m][1], m))
        facts = _without(rows, chosen)


def _without(rows: list[Poly], chosen: Monomial) -> set[Poly]:
    kept, above, below = set[Poly](), list[tuple[int, Poly]](), list[tuple[int, Poly]]()
    for row in rows:
        factor = dict(row.terms).get(chosen, 0)
        if factor == 0:
            kept.add(row)
        else:
            (above if factor > 0 else below).append((abs(factor), row))
    for up, one in above:
        for down, other in below:
            kept.add(_tight(one * down + other * up))
    return kept


def quotient(value: Poly, divisor: Poly) -> Poly:
    """The integer quotient, rounded down, for a divisor of at least 1."""
    return _parts(value, divisor)[0]


def remainder(value: Poly, divisor: Poly) -> Poly:
    """What is left of the integer quotient."""
    return _parts(value, divisor)[1]


@lru_cache(maxsize=1 << 16)
def _parts(value: Poly, divisor: Poly) -> tuple[Poly, Poly]:
    if divisor.constant == 1:
        return value, as_poly(0)
    multiple, rest = divided(value, divisor)
    if rest.constant is not None and divisor.constant is not None:
        return multiple + rest.constant // divisor.constant, as_poly(
            rest.constant % divisor.constant
        )
    if holds(rest) and holds(divisor - 1 - rest):
        return multiple, rest
    found = _of_quotient(rest, divisor)
    if found is None:
        found = of_atom(Atom(f"div({rest.name}, {divisor.name})", "div", (rest, divisor)))
    return multiple + found, rest - found * divisor


def _of_quotient(value: Poly, divisor: Poly) -> Poly | None:
    """⌊(⌊x / a⌋ + c) / b⌋ = ⌊(x + a c) / (a b)⌋, for known a and b of at least 1."""
    if divisor.constant is None:
        return None
    for monomial, factor in value.terms:
        if factor == 1 and len(monomial) == 1 and monomial[0].kind == "div":
            dividend, inner = monomial[0].args
            if inner.constant is not None:
                offset = value - of_atom(monomial[0])
                return quotient(dividend + offset * inner, inner * divisor)
    return None

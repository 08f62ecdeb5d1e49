"""Integer polynomials over atoms: sizes, indices, and quotients of these.

Sizes of dynamic axes and positions in tensors are such polynomials. Equal polynomials are the same
object, so that they are compared by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Monomial = tuple["Atom", ...]


@dataclass(frozen=True, order=True)
class Atom:
    """An integer unknown.

    Attributes:
        name: Names it; equal names are the same unknown.
        kind: `size` (of an axis), `var` (an index), `div`, or `data` (an integer that a tensor
            holds).
        args: Of a variable the number of its values, of a size its smallest value, and its largest
            one if there is one, of `div` the operands, of `data` the expression.
    """

    name: str
    kind: str = field(compare=False)
    args: tuple[Any, ...] = field(compare=False, default=(), repr=False)

    @property
    def first(self) -> Any:
        """Its first argument: the number of values of a variable, or the integer of a tensor."""
        found, *_ = self.args
        return found


class Poly:
    """A sum of products of atoms with integer coefficients; made by `poly`."""

    __slots__ = ("atoms", "name", "terms")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self.atoms = frozenset(atom for monomial, _ in terms for atom in monomial)
        self.name = " + ".join(_text(*term) for term in terms) or "0"

    def __repr__(self) -> str:
        return self.name

    def __add__(self, other: Poly | int) -> Poly:
        found = dict(self.terms)
        for monomial, factor in as_poly(other).terms:
            found[monomial] = found.get(monomial, 0) + factor
        return poly(found)

    def __sub__(self, other: Poly | int) -> Poly:
        return self + as_poly(other) * -1

    def __mul__(self, other: Poly | int) -> Poly:
        found: dict[Monomial, int] = {}
        for one, first in self.terms:
            for two, second in as_poly(other).terms:
                key = tuple(sorted(one + two))
                found[key] = found.get(key, 0) + first * second
        return poly(found)

    @property
    def constant(self) -> int | None:
        """The value of a polynomial without atoms, otherwise None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if self.terms[0][0] == () and len(self.terms) == 1 else None


def _text(monomial: Monomial, factor: int) -> str:
    names = "*".join(atom.name for atom in monomial)
    if not names:
        return str(factor)
    return names if factor == 1 else f"{factor}*{names}"


_MADE: dict[tuple[tuple[Monomial, int], ...], Poly] = {}


def poly(terms: Mapping[Monomial, int]) -> Poly:
    """The polynomial with these terms."""
    key = tuple(sorted((monomial, factor) for monomial, factor in terms.items() if factor))
    found = _MADE.get(key)
    if found is None:
        found = _MADE[key] = Poly(key)
    return found


def as_poly(value: Poly | int) -> Poly:
    """A number as a polynomial."""
    return poly({(): value}) if isinstance(value, int) else value


def of_atom(atom: Atom) -> Poly:
    """An atom as a polynomial."""
    return poly({(atom,): 1})


def size(name: str, *, least: int = 0, most: int | None = None) -> Poly:
    """The size of a dynamic axis, an integer.

    Args:
        name: Of the axis.
        least: Its smallest size, at least 0.
        most: Its largest size; None for no limit.
    """
    limits = "" if most is None else f" ≤ {most}"  # in the name: it tells atoms apart
    bound = f" ≥ {least}" if least else ""
    args = (as_poly(least),) if most is None else (as_poly(least), as_poly(most))
    return of_atom(Atom(f"{name}{bound}{limits}", "size", args))


def variable(name: str, count: Poly) -> Atom:
    """An index that runs from 0 to `count` - 1."""
    return Atom(f"{name}<{count.name}", "var", (count,))


def divided(value: Poly, divisor: Poly) -> tuple[Poly, Poly]:
    """The terms of `value` that are multiples of a divisor of one term, divided, and the others."""
    if len(divisor.terms) != 1:
        return as_poly(0), value
    (under, factor), *_ = divisor.terms
    quotient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, coefficient in value.terms:
        left = _removed(monomial, under)
        if left is None or coefficient % factor:
            rest[monomial] = coefficient
        else:
            quotient[left] = coefficient // factor
    return poly(quotient), poly(rest)


def _removed(monomial: Monomial, part: Monomial) -> Monomial | None:
    left = list(monomial)
    for atom in part:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)


def substitute(value: Poly, change: Callable[[Atom], Poly]) -> Poly:
    """A polynomial with other polynomials in place of its atoms."""
    total = as_poly(0)
    for monomial, factor in value.terms:
        product = as_poly(factor)
        for atom in monomial:
            product = product * change(atom)
        total = total + product
    return total

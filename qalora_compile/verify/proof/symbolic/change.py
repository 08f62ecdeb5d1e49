"""Replaces conditions and atoms in expressions."""

from __future__ import annotations

from qalora_compile.verify.proof.symbolic.arithmetic import quotient
from qalora_compile.verify.proof.symbolic.expression import (
    INTEGER,
    LEAF,
    LINEAR,
    REDUCED,
    Expr,
    atoms_of,
    index_of,
    integer,
    leaf,
    linear,
    rebuilt,
    reduced,
)
from qalora_compile.verify.proof.symbolic.polynomial import Atom, Poly, of_atom, substitute


class Change:
    """Replaces conditions and atoms in expressions.

    Args:
        conditions: Condition → `TRUE` or `FALSE`.
        atoms: Atom → the polynomial in its place.
    """

    def __init__(self, conditions: dict[Expr, Expr], atoms: dict[Atom, Poly]) -> None:
        self._conditions, self._atoms = conditions, atoms
        self._done: dict[Expr, Expr] = {}

    def of(self, value: Expr) -> Expr:
        """The changed expression."""
        if not self._touches(value):
            return value
        found = self._done.get(value)
        if found is None:
            found = self._done[value] = self._changed(value)
        return found

    def _touches(self, value: Expr) -> bool:
        return not value.atoms.isdisjoint(self._atoms) or not value.conditions.isdisjoint(
            self._conditions
        )

    def _changed(self, value: Expr) -> Expr:
        if value in self._conditions:
            return self._conditions[value]
        args = [self.of(arg) for arg in value.args]
        if value.op == LINEAR:
            return linear(self.poly(value.detail))
        if value.op == INTEGER:
            return integer(self.poly(value.detail))
        if value.op == LEAF:
            name, *indices = value.detail
            return leaf(name, [self.poly(index) for index in indices])
        if value.op == REDUCED:
            return self._reduced(value, *args)
        return rebuilt(value, args)

    def _reduced(self, value: Expr, body: Expr) -> Expr:
        kind, index = value.detail
        count = self.poly(index.first)
        if count is not index.first:
            renamed = Atom(f"{index.name.partition('<')[0]}<{count.name}", "var", (count,))
            body = Change({}, {index: of_atom(renamed)}).of(body)
            index = renamed
        return reduced(kind, index, body)

    def poly(self, value: Poly) -> Poly:
        """The changed polynomial."""
        if atoms_of(value).isdisjoint(self._atoms) and not self._conditions:
            return value
        return substitute(value, self._atom)

    def _atom(self, atom: Atom) -> Poly:
        if atom in self._atoms:
            return self._atoms[atom]
        if atom.kind == "div":
            return quotient(*map(self.poly, atom.args))
        if atom.kind == "data":
            value = self.of(atom.first)
            _, *count = atom.args
            if count and value.op == LEAF:
                return of_atom(Atom(f"data{value.number}", "data", (value, *count)))
            return index_of(value)
        return of_atom(atom)

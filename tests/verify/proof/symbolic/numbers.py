"""Evaluates symbolic tensors on numbers, for comparison with what operators really compute."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import digest_of
from qalora_compile.verify.proof.symbolic.expression import Expr
from qalora_compile.verify.proof.symbolic.normalize import Normalizer
from qalora_compile.verify.proof.symbolic.polynomial import Atom, Poly, as_poly, of_atom, variable
from qalora_compile.verify.proof.symbolic.tensor import Tensor

_FUNCTIONS: dict[str, Callable[..., float]] = {
    "exp": math.exp,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "sin": math.sin,
    "cos": math.cos,
    "inverse": lambda x: 1 / x,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "erf": math.erf,
    "isnan": math.isnan,
    "=": operator.eq,
    "root": math.sqrt,
    "min": min,
    "max": max,
    "abs": abs,
}


def leaves_of(values: Any) -> dict[str, Any]:
    """The values of a constant, and those of it transposed, by the names that leaves have."""
    flat = [np.ascontiguousarray(one).reshape(-1) for one in (values, values.T)]
    return {f"const {digest_of(one)}": one for one in flat}


class Numbers:
    """Values of leaves, by name, and of sizes and indices."""

    def __init__(self, leaves: Mapping[str, Any], atoms: Mapping[Atom, int]) -> None:
        self._leaves, self._atoms = leaves, dict(atoms)

    def poly(self, value: Poly) -> int:
        """The value of a polynomial."""
        return sum(
            factor * math.prod(self._atom(atom) for atom in monomial)
            for monomial, factor in value.terms
        )

    def _atom(self, atom: Atom) -> int:
        if atom.kind == "div":
            return self.poly(atom.args[0]) // self.poly(atom.args[1])
        if atom.kind == "data":
            return int(self.of(atom.args[0]))
        return self._atoms[atom]

    def of(self, value: Expr) -> float:
        """The value of an expression; a condition is 0 or 1."""
        found: float = getattr(self, f"_{value.op}")(value)
        return found

    def with_atom(self, atom: Atom, number: int) -> Numbers:
        """The same with the value of an index."""
        return Numbers(self._leaves, self._atoms | {atom: number})

    def _num(self, value: Expr) -> float:
        return float(value.detail)

    def _int(self, value: Expr) -> float:
        return self.poly(value.detail)

    def _true(self, _: Expr) -> float:
        return 1

    def _false(self, _: Expr) -> float:
        return 0

    def _leaf(self, value: Expr) -> float:
        name, *indices = value.detail
        places = tuple(map(self.poly, indices))
        assert all(place >= 0 for place in places)
        return float(self._leaves[name][places])

    def _sum(self, value: Expr) -> float:
        first, *factors = value.detail
        return first + sum(f * self.of(a) for f, a in zip(factors, value.args, strict=True))

    def _product(self, value: Expr) -> float:
        first, *powers = value.detail
        pairs = zip(powers, value.args, strict=True)
        return float(first * math.prod(self.of(a) ** p for p, a in pairs))

    def _fn(self, value: Expr) -> float:
        if value.detail == "≤":
            return float(self.of(value.args[0]) <= self.of(value.args[1]))
        return float(_FUNCTIONS[value.detail](*map(self.of, value.args)))

    def _where(self, value: Expr) -> float:
        which, then, other = value.args
        return self.of(then if self.of(which) else other)

    def _truth(self, value: Expr) -> float:
        return float(self.of(value.args[0]) != 0)

    def _linear(self, value: Expr) -> float:
        return float(self.poly(value.detail) >= 0)

    def _reduced(self, value: Expr) -> float:
        kind, index = value.detail
        (body,) = value.args
        combine: Callable[..., float] = max if kind == "max" else sum
        return combine(self.with_atom(index, i).of(body) for i in range(self.poly(index.args[0])))


def array(value: Tensor, numbers: Numbers, *, normal: bool) -> Any:
    """All elements of a tensor; `normal`: of their normal forms at a generic index."""
    shape = [numbers.poly(size) for size in value.shape]
    found = np.zeros(shape)
    indices = [variable(f"i{axis}", size) for axis, size in enumerate(value.shape)]
    generic = None
    if normal:
        ones = [size.constant == 1 for size in value.shape]
        at = (as_poly(0) if one else of_atom(i) for i, one in zip(indices, ones, strict=True))
        generic = Normalizer().of(value[tuple(at)])
    for place in itertools.product(*map(range, shape)):
        here = numbers
        for index, number in zip(indices, place, strict=True):
            here = here.with_atom(index, number)
        element = value[tuple(map(as_poly, place))] if generic is None else generic
        found[place] = here.of(element)
    return found

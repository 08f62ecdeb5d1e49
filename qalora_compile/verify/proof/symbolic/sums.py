"""Sums over bound indices: matrix products, means, softmax and norms, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qalora_compile.verify.proof.symbolic.expression import (
    MAX,
    SUM,
    ZERO,
    Expr,
    add,
    exponential,
    function,
    integer,
    inverse,
    linear,
    mul,
    reduced,
    where,
)
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly, of_atom, variable
from qalora_compile.verify.proof.symbolic.tensor import (
    ONE_ELEMENT,
    Index,
    Tensor,
    UnprovableError,
    broadcast,
    elementwise,
    fresh_name,
)


def summed(size: Poly, body: Callable[[Poly], Expr]) -> Expr:
    """The sum of an expression over an index."""
    if size is ONE_ELEMENT:
        return body(as_poly(0))
    index = variable(fresh_name(), size)
    return reduced(SUM, index, body(of_atom(index)))


def largest(size: Poly, body: Callable[[Poly], Expr]) -> Expr:
    """The largest value of an expression over an index."""
    if size is ONE_ELEMENT:
        return body(as_poly(0))
    index = variable(fresh_name(), size)
    return reduced(MAX, index, body(of_atom(index)))


def total(value: Tensor, axis: int, *, kept: bool) -> Tensor:
    """The sum along an axis."""
    axis = value.axis(axis)
    size = value.shape[axis]
    middle = (ONE_ELEMENT,) if kept else ()

    def element(index: Index) -> Expr:
        before, behind = index[:axis], index[axis + len(middle) :]
        return summed(size, lambda i: value[(*before, i, *behind)])

    shape = (*value.shape[:axis], *middle, *value.shape[axis + 1 :])
    return Tensor(shape, value.dtype, element)


def mean(value: Tensor, axis: int, *, kept: bool) -> Tensor:
    """The mean along an axis."""
    share = inverse(integer(value.shape[value.axis(axis)]))
    return elementwise(lambda x: mul(x, share), value.dtype, total(value, axis, kept=kept))


def cumulated(value: Tensor, axis: int) -> Tensor:
    """The sums up to each place along an axis."""
    axis = value.axis(axis)

    def element(index: Index) -> Expr:
        def term(place: Poly) -> Expr:
            inside = value[(*index[:axis], place, *index[axis + 1 :])]
            return where(linear(index[axis] - place), inside, ZERO)

        return summed(value.shape[axis], term)

    return Tensor(value.shape, value.dtype, element)


def reduced_over(
    value: Tensor, axes: Sequence[int], reduce: Callable[..., Tensor], *, kept: bool
) -> Tensor:
    """The sum or mean along several axes, one after the other."""
    places = {value.axis(axis) for axis in axes}
    if not places:
        raise UnprovableError("the axes of a sum are not known")
    for axis in sorted(places, reverse=True):
        value = reduce(value, axis, kept=kept)
    return value


def softmax(value: Tensor, axis: int) -> Tensor:
    """exp(x) / Σ exp(x), which subtracting the maximum does not change."""
    powers = elementwise(exponential, value.dtype, value)
    sums = total(powers, axis, kept=True)
    return elementwise(lambda x, s: mul(x, inverse(s)), value.dtype, powers, sums)


def matmul(one: Tensor, other: Tensor) -> Tensor:
    """The matrix product of the last two axes, with the others broadcast."""
    if one.rank < 2 or other.rank < 2 or one.shape[-1] is not other.shape[-2]:
        raise UnprovableError("a matrix product of shapes that are not known to fit")
    lead = broadcast(one.shape[:-2], other.shape[:-2])

    def element(index: Index) -> Expr:
        *_, row, column = index

        def term(i: Poly) -> Expr:
            return mul(_at(one, index[:-2], row, i), _at(other, index[:-2], i, column))

        return summed(one.shape[-1], term)

    return Tensor((*lead, one.shape[-2], other.shape[-1]), one.dtype, element)


def _at(value: Tensor, lead: Index, row: Poly, column: Poly) -> Expr:
    own = lead[len(lead) - (value.rank - 2) :] if value.rank > 2 else ()
    pairs = zip(own, value.shape, strict=False)
    return value[(*(as_poly(0) if s is ONE_ELEMENT else p for p, s in pairs), row, column)]


def rms_norm(value: Tensor, weight: Tensor, eps: Expr) -> Tensor:
    """X / √(mean(x²) + eps) · weight."""
    squares = elementwise(lambda x: mul(x, x), value.dtype, value)
    scale = elementwise(
        lambda m: inverse(function("sqrt", add(m, eps))), value.dtype, mean(squares, -1, kept=True)
    )
    return elementwise(mul, value.dtype, value, scale, weight)

"""Operators with the same meaning in both dialects, in terms of `tensor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from qalora_compile.untrusted.element_types import FLOATS, HALVES
from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor, digest_of
from qalora_compile.verify.proof.symbolic.arithmetic import holds, quotient
from qalora_compile.verify.proof.symbolic.expression import (
    FALSE,
    INTEGER,
    NUMBER,
    ONE,
    REDUCED,
    SUM,
    TRUE,
    TRUTH,
    WHERE,
    ZERO,
    Expr,
    add,
    as_integer,
    both,
    compare,
    equal,
    function,
    integer,
    inverse,
    leaf,
    mul,
    negated,
    number,
    truth,
    where,
)
from qalora_compile.verify.proof.symbolic.polynomial import Atom, Poly, as_poly
from qalora_compile.verify.proof.symbolic.roots import root
from qalora_compile.verify.proof.symbolic.tensor import (
    BOOL,
    FLOAT,
    INT,
    Index,
    Tensor,
    UnprovableError,
    at,
    broadcast,
    elementwise,
    place_of,
    scalar,
    wrapped,
)

_INTEGERS = ("int64", "int32")
_CODES = ("uint8", "uint4", "uint2")
_UNIFORM = 1 << 20
"""Tensors of at most this many elements are searched for one value."""
_TRANSPOSED = 1 << 24
"""Matrices of at most this many elements are the same as their transposes."""
_LISTED = 1 << 12
"""Integers of at most this many elements are known one by one."""


def kind_of(dtype: str | None) -> str:
    """The dtype of a value in exact arithmetic: `bool`, `int64` or `float32`.

    Raises:
        UnprovableError: it is of another type, which rounds or wraps elsewhere.
    """
    if dtype == "bool":
        return BOOL
    if dtype in _INTEGERS:
        return INT
    if dtype in FLOATS and dtype != "float64":
        return FLOAT
    raise UnprovableError(f"values of type {dtype}")


def common(*values: Tensor) -> str:
    """The dtype that operands are promoted to."""
    kinds = [value.dtype for value in values]
    return FLOAT if FLOAT in kinds else INT if INT in kinds else BOOL


def literal(value: Any) -> Tensor:
    """A Python number."""
    if isinstance(value, bool):
        return scalar(TRUE if value else FALSE, BOOL)
    if isinstance(value, int):
        return scalar(integer(value), INT)
    if isinstance(value, float):
        return scalar(number(value), FLOAT)
    raise UnprovableError(f"the operand {value!r}")


def stored(value: StoredTensor) -> Tensor:
    """A stored tensor; elements are known by value, or by the digest of all values."""
    shape = tuple(map(as_poly, value.shape))
    if value.dtype in _CODES:
        return Tensor(shape, value.dtype, _no_number, value)
    kind = kind_of(value.dtype)
    single = _uniform(value)
    scale = root(single) if kind == FLOAT and value.size == 1 else None
    if scale is not None:
        return Tensor(shape, kind, lambda _: scale, value)
    if single is not None:
        return Tensor(shape, kind, lambda _: element_of(single, kind), value)
    small = value.values() if kind == INT and value.size <= _LISTED else None

    name = cache(lambda: _named(value))

    def element(index: Index) -> Expr:
        places = [place.constant for place in index]
        if small is not None and None not in places:
            return element_of(small[tuple(places)].item(), kind)
        called, turned = name()
        offset = as_poly(0)
        pairs = list(zip(index, shape, strict=True))
        for place, size in pairs[::-1] if turned else pairs:
            offset = offset * size + place
        found = leaf(f"const {called}", [offset])
        return truth(found) if kind == BOOL else found

    return Tensor(shape, kind, element, value)


def _named(value: StoredTensor) -> tuple[str, bool]:
    """The digest of all values in order, and whether a matrix is read column by column.

    Of both orders of a matrix, the one with the smaller digest counts: exports transpose weights.
    """
    values = value.values()
    found = digest_of(np.ascontiguousarray(values).reshape(-1))
    if len(value.shape) != 2 or value.size > _TRANSPOSED:
        return found, False
    other = digest_of(np.ascontiguousarray(values.T).reshape(-1))
    return min((found, False), (other, True))


def _no_number(_: Index) -> Expr:
    raise UnprovableError("codes outside of a layer")


def _uniform(value: StoredTensor) -> Any:
    """The value of all elements, if they are equal."""
    if not 0 < value.size <= _UNIFORM:
        return None
    values: Array = value.values().reshape(-1)
    return values[0].item() if bool((values == values[0]).all()) else None


def element_of(value: Any, kind: str) -> Expr:
    """A known element of a tensor."""
    if kind == BOOL:
        return TRUE if value else FALSE
    return integer(int(value)) if kind == INT else number(float(value))


def cast(value: Tensor, dtype: str | None) -> Tensor:
    """A cast that changes no value in exact arithmetic, or makes conditions of numbers."""
    kind = kind_of(dtype)
    if dtype in HALVES:
        raise UnprovableError(f"a cast to {dtype}, which rounds or wraps")
    if dtype == "int32" and value.dtype != BOOL:
        return elementwise(_counted, INT, value)
    if value.dtype == kind or (value.dtype, kind) == (INT, FLOAT):
        return Tensor(value.shape, kind, lambda index: value[index])
    if value.dtype == BOOL:
        return elementwise(lambda x: where(x, ONE, ZERO), kind, value)
    if kind == BOOL:
        return elementwise(_is_true, kind, value)
    return elementwise(lambda x: function("truncate", x), kind, value)


def _counted(value: Expr) -> Expr:
    """A small number, the count of an axis's elements, or a size: these fit in 32 bits."""
    small = value.op == NUMBER and float(value.detail).is_integer()
    if small or _is_count(value) or (value.op == SUM and _is_whole(value)):
        return value
    if value.op == SUM and value.detail[1:] == (1.0,) and abs(value.detail[0]) <= 1:
        return add(number(value.detail[0]), _counted(value.operand))
    if value.op == INTEGER and all(_is_size(*term) for term in value.detail.terms):
        return value
    raise UnprovableError("a cast to int32, which rounds or wraps")


def _is_count(value: Expr) -> bool:
    return value.op == REDUCED and (_is_bit(value.operand) or _is_count(value.operand))


def _is_whole(value: Expr) -> bool:
    """A sum of counts, each of them added or subtracted once."""
    first, *factors = value.detail
    return first == 0 and {*factors} <= {1.0, -1.0} and all(map(_is_count, value.args))


def _is_size(monomial: tuple[Atom, ...], factor: int) -> bool:
    if not monomial:
        return abs(factor) <= _LISTED
    return factor == 1 and len(monomial) == 1 and monomial[0].kind in ("size", "filled")


def _is_bit(value: Expr) -> bool:
    if value.op == WHERE:
        _, *cases = value.args
        return all(map(_is_bit, cases))
    return value in (ZERO, ONE)


def _is_true(value: Expr) -> Expr:
    return negated(equal(value, ZERO))


def unary(name: str) -> Callable[[Tensor], Tensor]:
    """A function of which only the name is known; the root of a number is one in float32."""

    def element(x: Expr) -> Expr:
        if name != "sqrt" or x.op != NUMBER or x.detail < 0:
            return function(name, x)
        found = number(x.detail**0.5)
        known = root(float(found.detail))
        return found if known is None else known

    return lambda value: elementwise(element, FLOAT, floating(value))


def floating(value: Tensor) -> Tensor:
    """A tensor of floats.

    Raises:
        UnprovableError: it is boolean.
    """
    if value.dtype == BOOL:
        raise UnprovableError("arithmetic with booleans")
    return value


def total(*values: Tensor) -> Tensor:
    """A sum of two tensors."""
    return elementwise(add, common(*map(floating, values)), *values)


def difference(one: Tensor, other: Tensor) -> Tensor:
    """One tensor minus another."""
    return total(one, scaled(other, -1))


def product(*values: Tensor) -> Tensor:
    """A product of two tensors."""
    return elementwise(mul, common(*map(floating, values)), *values)


def scaled(value: Tensor, factor: int) -> Tensor:
    """A tensor times an integer."""
    return elementwise(lambda x: mul(integer(factor), x), value.dtype, floating(value))


def divided(one: Tensor, other: Tensor) -> Tensor:
    """One tensor by another, as floats."""
    return elementwise(lambda x, y: mul(x, inverse(y)), FLOAT, floating(one), floating(other))


def power(value: Tensor, exponent: Tensor) -> Tensor:
    """Small integer powers and roots; other exponents stay."""

    def element(x: Expr, e: Expr) -> Expr:
        if e.op == "num" and e.detail in (2.0, 3.0):
            return mul(*[x] * int(e.detail))
        if e.op == "num" and e.detail == -0.5:
            return inverse(function("sqrt", x))
        return function("pow", x, e)

    return elementwise(element, FLOAT, floating(value), floating(exponent))


def absolute(value: Tensor) -> Tensor:
    """|x|, of integers by cases."""
    if value.dtype != INT:
        return unary("abs")(value)
    return elementwise(lambda x: where(compare(ZERO, x), x, mul(number(-1), x)), INT, value)


def floor_divided(one: Tensor, other: Tensor) -> Tensor:
    """The quotient of two integers that are not negative, rounded down."""

    def element(a: Expr, b: Expr) -> Expr:
        top, bottom = as_integer(a), as_integer(b)
        if top is None or bottom is None or not holds(bottom - 1):
            raise UnprovableError("a division of integers that are not known as sizes")
        return integer(quotient(top, bottom))

    return elementwise(element, INT, _integer(one), _integer(other))


def _integer(value: Tensor) -> Tensor:
    if value.dtype != INT:
        raise UnprovableError("a division of integers by numbers")
    return value


def silu(value: Tensor) -> Tensor:
    """X · sigmoid(x)."""
    return product(value, unary("sigmoid")(value))


def at_most(one: Tensor, other: Tensor) -> Tensor:
    """One ≤ other."""
    return elementwise(compare, BOOL, floating(one), floating(other))


def less(one: Tensor, other: Tensor) -> Tensor:
    """One < other."""
    return complement(at_most(other, one))


def same(one: Tensor, other: Tensor) -> Tensor:
    """One = other."""
    if one.dtype == other.dtype == BOOL:
        return elementwise(lambda x, y: where(x, y, negated(y)), BOOL, one, other)
    return elementwise(equal, BOOL, floating(one), floating(other))


def conjunction(one: Tensor, other: Tensor) -> Tensor:
    """Both of two conditions."""
    return elementwise(both, BOOL, condition(one), condition(other))


def alternative(one: Tensor, other: Tensor) -> Tensor:
    """One of two conditions, or both."""
    return elementwise(lambda x, y: where(x, TRUE, y), BOOL, condition(one), condition(other))


def complement(value: Tensor) -> Tensor:
    """Not a condition."""
    return elementwise(negated, BOOL, condition(value))


def condition(value: Tensor) -> Tensor:
    """A boolean tensor.

    Raises:
        UnprovableError: it is of numbers.
    """
    if value.dtype != BOOL:
        raise UnprovableError("logic with numbers")
    return value


def choice(which: Tensor, then: Tensor, other: Tensor) -> Tensor:
    """Elements of one tensor or the other."""
    return elementwise(where, common(then, other), condition(which), then, other)


def larger(one: Tensor, other: Tensor) -> Tensor:
    """The larger of two elements."""

    def element(x: Expr, y: Expr) -> Expr:
        order = compare(x, y)
        return where(order, y, x) if order.op != TRUTH else function("max", *sorted((x, y)))

    return elementwise(element, common(one, other), floating(one), floating(other))


def smaller(one: Tensor, other: Tensor) -> Tensor:
    """The smaller of two elements."""

    def element(x: Expr, y: Expr) -> Expr:
        order = compare(x, y)
        return where(order, x, y) if order.op != TRUTH else function("min", *sorted((x, y)))

    return elementwise(element, common(one, other), floating(one), floating(other))


def clamped(value: Tensor, least: Tensor | None, most: Tensor | None) -> Tensor:
    """Elements that are not below one number and not above another one."""
    value = value if least is None else larger(value, least)
    return value if most is None else smaller(value, most)


def arange(start: Poly, end: Poly) -> Tensor:
    """The integers from `start` to `end` - 1."""
    return Tensor((end - start,), INT, lambda index: integer(start + index[0]))


def lookup(value: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Elements at broadcast places along the first axes."""
    lead = broadcast(*(place.shape for place in places))
    behind = value.shape[len(places) :]

    def element(index: Index) -> Expr:
        head, tail = index[: len(lead)], index[len(lead) :]
        found = (place_of(at(place, head)) for place in places)
        pairs = zip(found, value.shape, strict=False)
        return value[(*(wrapped(place, size) for place, size in pairs), *tail)]

    return Tensor((*lead, *behind), value.dtype, element)

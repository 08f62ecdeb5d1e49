"""Orders of elements: topk and sort as functions of complete tensors of which no more is known.

Two orders are the same if they are of the same tensors, element by element. The place of each
element in an order is an integer from 0 to the number of elements that are ordered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import from_array
from qalora_compile.verify.proof.symbolic.arithmetic import holds
from qalora_compile.verify.proof.symbolic.expression import (
    LEAF,
    ONE,
    ZERO,
    Expr,
    as_integer,
    integer,
    leaf,
    where,
)
from qalora_compile.verify.proof.symbolic.normalize import Normalizer, TooLargeError
from qalora_compile.verify.proof.symbolic.operators import difference, less, stored
from qalora_compile.verify.proof.symbolic.polynomial import (
    Atom,
    Poly,
    as_poly,
    of_atom,
    variable,
)
from qalora_compile.verify.proof.symbolic.sums import total
from qalora_compile.verify.proof.symbolic.tensor import (
    FLOAT,
    INT,
    ONE_ELEMENT,
    Index,
    Tensor,
    UnprovableError,
    cut,
    elementwise,
    expand,
    gather_elements,
    unsqueeze,
)

TIES = (
    "where topk or sort meets equal numbers, both runtimes take them in the order of their "
    "positions (torch on CPUs and ONNX Runtime do)"
)
_ORDER = "order of "
_BINS = 1 << 16
"""With more bins, rounded bounds might not lie between integers."""


class OfTensor(str):
    """The name of a function of complete tensors, by the generic elements of these.

    Attributes:
        forms: The elements in normal form.
        complete: The number of elements that are ordered, each of which comes once; None otherwise.
    """

    __slots__ = ("complete", "forms")
    forms: tuple[Expr, ...]
    complete: Poly | None


def function_of(name: str, values: Sequence[Tensor], complete: Poly | None = None) -> OfTensor:
    """The name of a function of tensors: the same for tensors that are equal in normal form.

    Raises:
        UnprovableError: there are too many cases.
    """
    forms, shown = [], [name]
    for value in values:
        places = (
            as_poly(0) if size is ONE_ELEMENT else of_atom(variable(f"h{axis}", size))
            for axis, size in enumerate(value.shape)
        )
        try:
            forms.append(Normalizer().of(value[tuple(places)]))
        except TooLargeError as error:
            raise UnprovableError("there are too many cases of an ordered element") from error
        shape = ", ".join(size.name for size in value.shape)
        shown.append(f"#{forms[-1].number}: {value.dtype}[{shape}]")
    found = OfTensor(" ".join(shown))
    found.forms, found.complete = tuple(forms), complete
    return found


def _places(name: OfTensor, shape: tuple[Poly, ...], count: Poly) -> Tensor:
    """Integers from 0 to `count` - 1."""

    def element(index: Index) -> Expr:
        value = leaf(name, index)
        return integer(of_atom(Atom(f"data{value.number}", "data", (value, count))))

    return Tensor(shape, INT, element)


def is_order(value: Expr) -> bool:
    """Whether it is a place in an order."""
    name = value.detail[0] if value.op == LEAF else ""
    return isinstance(name, OfTensor) and name.startswith(_ORDER)


def topk(value: Tensor, k: Poly, axis: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The k largest or smallest elements along an axis, in order, and their places."""
    axis = value.axis(axis)
    count = value.shape[axis]
    complete = count if k is count and value.rank == 1 else None
    name = function_of(f"{_ORDER}{k.name} along {axis}, {largest}", [value], complete)
    shape = (*value.shape[:axis], k, *value.shape[axis + 1 :])
    places = _places(name, shape, count)
    return gather_elements(value, axis, places), places


def argmax(value: Tensor, axis: int, *, kept: bool) -> Tensor:
    """The place of the largest element along an axis."""
    axis = value.axis(axis)
    count = value.shape[axis]
    shape = (*value.shape[:axis], *value.shape[axis + 1 :])
    found = _places(function_of(f"{_ORDER}1 along {axis}", [value]), shape, count)
    return unsqueeze(found, [axis]) if kept else found


def scattered(value: Tensor, axis: int, places: Tensor, written: Tensor) -> Tensor:
    """A tensor with other elements at places along an axis, which have to be some of an order.

    Raises:
        UnprovableError: two elements may be written at one place.
    """
    axis = value.axis(axis)
    index = tuple(of_atom(variable(f"h{i}", size)) for i, size in enumerate(places.shape))
    known = as_integer(places[index])
    atoms = [] if known is None else [atom for atom in known.atoms if atom.kind == "data"]
    if len(atoms) != 1 or known is not of_atom(atoms[0]) or not is_order(atoms[0].first):
        raise UnprovableError("elements are written at places that may be equal")
    if atoms[0].first.detail[1:] != index or f"along {axis}" not in atoms[0].first.detail[0]:
        raise UnprovableError("elements are written at places that may be equal")
    if written.shape != places.shape or value.dtype != written.dtype:
        raise UnprovableError("elements of another type, or at more places, are written")
    name = function_of(f"scattered along {axis}", [value, places, written])
    return Tensor(value.shape, value.dtype, lambda at: leaf(name, at))


def inverse_order(places: Tensor, values: Tensor) -> Tensor:
    """The tensor that holds j at the j-th place, for the places of a complete order.

    Raises:
        UnprovableError: they are not all places, each once, or the values are not 0, 1, 2 …
    """
    if places.rank != 1 or values.shape != places.shape:
        raise UnprovableError("elements are written at places of another shape")
    index = (of_atom(variable("h0", places.shape[0])),)
    known, counted = as_integer(places[index]), as_integer(values[index])
    atoms = [] if known is None else [atom for atom in known.atoms if atom.kind == "data"]
    if counted is not index[0] or len(atoms) != 1 or known is not of_atom(atoms[0]):
        raise UnprovableError("elements are written at places that are no order")
    name, *read = atoms[0].first.detail
    if not isinstance(name, OfTensor) or name.complete is not places.shape[0] or read != [*index]:
        raise UnprovableError("elements are written at places that may be equal")
    return _places(function_of("inverse order", [places]), places.shape, places.shape[0])


def counts_of(value: Tensor, bins: int, low: float, high: float) -> Tensor:
    """How often each integer from `low` to `high` comes in a vector of such integers.

    In the words of ONNX's form of `histc`: below the next bound, less those below the own one.
    Bounds lie between integers, since there are as many bins as integers.
    """
    count = value.shape[0]
    index = (of_atom(variable("h0", count)),)
    if low != 0 or bins != high + 1 or bins > _BINS:
        raise UnprovableError("a histogram with bins of more or less than an integer")
    known = as_integer(value[index]) if value.rank == 1 else None
    if known is None or not holds(known) or not holds(as_poly(bins - 1) - known):
        raise UnprovableError("a histogram of numbers that are not known to be in its bins")
    bounds = np.asarray([high * i / bins for i in range(bins + 1)], np.float32)
    bounds[-1] = np.nextafter(np.float32(high), np.float32(np.inf))
    edges = stored(from_array("bounds", bounds.reshape(-1, 1)))
    rows = expand(unsqueeze(value, [0]), (as_poly(bins + 1), count))
    below = elementwise(
        lambda c: where(c, ONE, ZERO),
        FLOAT,
        less(Tensor(rows.shape, FLOAT, lambda i: rows[i]), edges),
    )
    sums = total(below, 1, kept=False)
    return difference(cut(sums, 0, as_poly(1), None), cut(sums, 0, as_poly(0), as_poly(bins)))

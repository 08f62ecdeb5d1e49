"""Tensors as functions from indices to expressions, and what operators of both dialects do to them.

Reshapes, transpositions, slices, concatenations and lookups change indices; matrix products,
softmax and means are sums over bound indices, in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, zip_longest

from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.symbolic.arithmetic import holds, quotient, remainder
from qalora_compile.verify.proof.symbolic.expression import (
    Expr,
    as_integer,
    index_of,
    integer,
    linear,
    where,
)
from qalora_compile.verify.proof.symbolic.normalize import Normalizer, TooLargeError
from qalora_compile.verify.proof.symbolic.polynomial import (
    Poly,
    as_poly,
    divided,
)

Shape = tuple[Poly, ...]
Index = tuple[Poly, ...]
_FRESH = count()
ONE_ELEMENT = as_poly(1)
BOOL, INT, FLOAT = "bool", "int64", "float32"


class UnprovableError(Exception):
    """A tensor has no symbolic form; the text says why."""


class TooShortError(UnprovableError):
    """A tensor has no symbolic form unless an axis has more elements than is assumed."""


class Tensor:
    """A tensor.

    Args:
        shape: Its sizes.
        dtype: Its dtype.
        element: The expression at an index.
        stored: The stored tensor that it is, if it is one.

    Attributes:
        parts: Of a concatenation, its axis and what begins where.
    """

    parts: tuple[int, list[tuple[Poly, Tensor]]] | None = None

    def __init__(
        self,
        shape: Shape,
        dtype: str,
        element: Callable[[Index], Expr],
        stored: StoredTensor | None = None,
    ) -> None:
        self.stored = stored
        self.shape, self.dtype, self._element = shape, dtype, element
        self._known: dict[Index, Expr] = {}

    def __getitem__(self, index: Index) -> Expr:
        found = self._known.get(index)
        if found is None:
            found = self._known[index] = self._element(index)
        return found

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def axis(self, number: int) -> int:
        """An axis, counted from the end if negative."""
        axis = number + self.rank if number < 0 else number
        if not 0 <= axis < max(self.rank, 1):
            raise UnprovableError(f"axis {number} of {self.rank}")
        return axis


def only_floats(value: Tensor) -> Tensor:
    """A tensor of floats; an `UnprovableError` for others."""
    if value.dtype != FLOAT:
        raise UnprovableError(f"an operand of type {value.dtype}")
    return value


def scalar(value: Expr, dtype: str) -> Tensor:
    """A tensor without axes."""
    return Tensor((), dtype, lambda _: value)


def sizes(values: Sequence[Poly]) -> Tensor:
    """A vector of integers that are known as polynomials."""

    def element(index: Index) -> Expr:
        place = index[0].constant
        if place is None or not 0 <= place < len(values):
            raise UnprovableError("a size is looked up at an unknown place")
        return integer(values[place])

    return Tensor((as_poly(len(values)),), INT, element)


def integers(value: Tensor) -> list[Poly]:
    """The elements of a vector, or of a tensor without axes, as polynomials."""
    if value.rank == 0:
        return [index_of(value[()])]
    length = value.shape[0].constant
    if value.rank > 1 or length is None:
        raise UnprovableError("sizes are no vector")
    return [index_of(value[(as_poly(i),)]) for i in range(length)]


def fresh_name() -> str:
    """A name that no other bound index has."""
    return f"v{next(_FRESH)}"


def broadcast(*shapes: Shape) -> Shape:
    """The common shape.

    Raises:
        UnprovableError: two sizes are not known to be equal.
    """
    result: list[Poly] = []
    for column in zip_longest(*(shape[::-1] for shape in shapes), fillvalue=ONE_ELEMENT):
        found = {size for size in column if size is not ONE_ELEMENT}
        if len(found) > 1:
            names = " and ".join(sorted(size.name for size in found))
            raise UnprovableError(f"sizes {names} are not known to be equal")
        result.append(found.pop() if found else ONE_ELEMENT)
    return tuple(result[::-1])


def at(value: Tensor, index: Index) -> Expr:
    """The element that broadcasting puts at an index."""
    own = index[len(index) - value.rank :] if value.rank else ()
    pairs = zip(own, value.shape, strict=True)
    return value[tuple(as_poly(0) if size is ONE_ELEMENT else place for place, size in pairs)]


def elementwise(make: Callable[..., Expr], dtype: str, *values: Tensor) -> Tensor:
    """An operator that acts on elements, with broadcasting."""
    shape = broadcast(*(value.shape for value in values))
    return Tensor(shape, dtype, lambda index: make(*(at(value, index) for value in values)))


def expand(value: Tensor, shape: Shape) -> Tensor:
    """Broadcast to a shape, in which axes of size 1 keep the tensor's size."""
    result = broadcast(value.shape, shape)
    return Tensor(result, value.dtype, lambda index: at(value, index))


def transpose(value: Tensor, axes: Sequence[int]) -> Tensor:
    """Axes in another order."""
    places = [value.axis(axis) for axis in axes]
    if sorted(places) != list(range(value.rank)):
        raise UnprovableError(f"axes {axes} of a tensor with {value.rank}")

    def element(index: Index) -> Expr:
        return value[tuple(index[places.index(axis)] for axis in range(value.rank))]

    return Tensor(tuple(value.shape[p] for p in places), value.dtype, element)


def unsqueeze(value: Tensor, axes: Sequence[int]) -> Tensor:
    """New axes of size 1."""
    rank = value.rank + len(axes)
    new = {axis + rank if axis < 0 else axis for axis in axes}
    kept = [axis for axis in range(rank) if axis not in new]
    old = iter(value.shape)
    shape = tuple(ONE_ELEMENT if axis in new else next(old) for axis in range(rank))
    return Tensor(shape, value.dtype, lambda index: value[tuple(index[axis] for axis in kept)])


def squeeze(value: Tensor, axes: Sequence[int] | None) -> Tensor:
    """Without axes of size 1; None: without all of them."""
    given = range(value.rank) if axes is None else map(value.axis, axes)
    gone = {axis for axis in given if value.shape[axis] is ONE_ELEMENT}
    if axes is not None and len(gone) != len(axes):
        raise UnprovableError("a squeezed axis is not known to have size 1")
    if axes is None and any(size.constant is None for size in value.shape):
        raise UnprovableError("all axes of size 1 are squeezed, and a size is not known")
    shape = tuple(size for axis, size in enumerate(value.shape) if axis not in gone)

    def element(index: Index) -> Expr:
        places = iter(index)
        return value[tuple(as_poly(0) if a in gone else next(places) for a in range(value.rank))]

    return Tensor(shape, value.dtype, element)


def cut(value: Tensor, axis: int, start: Poly, end: Poly | None, step: int = 1) -> Tensor:
    """A slice; a negative start or end counts from the end, None is the end."""
    axis = value.axis(axis)
    size = value.shape[axis]
    begin = _bounded(start, size)
    stop = size if end is None else _bounded(end, size)
    if step < 1 or not holds(stop - begin):
        raise TooShortError("a slice has no known length")
    length = stop - begin if step == 1 else quotient(stop - begin + (step - 1), as_poly(step))
    shape = (*value.shape[:axis], length, *value.shape[axis + 1 :])
    for first, part in value.parts[1] if value.parts and value.parts[0] == axis else ():
        if first is begin and part.shape[axis] is length and step == 1:
            return part

    def element(index: Index) -> Expr:
        place = begin + index[axis] * step
        return value[(*index[:axis], place, *index[axis + 1 :])]

    return Tensor(shape, value.dtype, element)


def _bounded(place: Poly, size: Poly) -> Poly:
    """A start or end between 0 and the size."""
    known = place.constant
    if known is not None and known >= 1 << 31:
        return size
    if known is not None and known < 0:
        place = as_poly(0) if known <= -(1 << 31) else place + size
    if holds(place) and holds(size - place):
        return place
    if holds(place - size):
        return size
    raise TooShortError(f"{place.name} is not known to be from 0 to {size.name}")


def concatenate(values: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors one behind the other."""
    axis = values[0].axis(axis)
    starts = [as_poly(0)]
    for value in values:
        if value.rank != values[0].rank:
            raise UnprovableError("concatenated tensors have different ranks")
        for other, size in enumerate(value.shape):
            if other != axis and size is not values[0].shape[other]:
                raise UnprovableError("concatenated tensors are not known to have equal sizes")
        starts.append(starts[-1] + value.shape[axis])
    shape = (*values[0].shape[:axis], starts[-1], *values[0].shape[axis + 1 :])

    def element(index: Index) -> Expr:
        def of(part: int) -> Expr:
            place = index[axis] - starts[part]
            inside = (*index[:axis], place, *index[axis + 1 :])
            if part + 1 == len(values):
                return values[part][inside]
            before = linear(starts[part + 1] - 1 - index[axis])
            if before.op == "true":
                return values[part][inside]
            return (
                of(part + 1)
                if before.op == "false"
                else where(before, values[part][inside], of(part + 1))
            )

        return of(0)

    found = Tensor(shape, values[0].dtype, element)
    found.parts = axis, list(zip(starts, values, strict=False))
    return found


def product_of(values: Sequence[Poly]) -> Poly:
    """The product of sizes."""
    total = as_poly(1)
    for value in values:
        total = total * value
    return total


def completed(value: Tensor, shape: Sequence[Poly]) -> Shape:
    """A target shape in which one size may be -1: what is left of the others."""
    left, known = list(value.shape), []
    for size in shape:
        if size.constant == -1:
            continue
        if size in left:
            left.remove(size)
        else:
            known.append(size)
    inferred, rest = divided(product_of(left), product_of(known))
    if rest.terms:
        raise UnprovableError("the size of a reshaped axis is not known")
    found = tuple(inferred if size.constant == -1 else size for size in shape)
    if product_of(found) is not product_of(value.shape):
        raise UnprovableError("a reshape is not known to keep the number of elements")
    return found


def reshape(value: Tensor, shape: Sequence[Poly]) -> Tensor:
    """The same elements in order, with other axes; one size may be -1."""
    target = completed(value, shape)
    groups = _groups(value.shape, target)

    def element(index: Index) -> Expr:
        found: list[Poly] = []
        for old, new in groups:
            offset = as_poly(0)
            for axis in new:
                offset = offset * target[axis] + index[axis]
            parts: list[Poly] = []
            for axis in reversed(old):
                first = axis == old[0]
                parts.append(offset if first else remainder(offset, value.shape[axis]))
                offset = offset if first else quotient(offset, value.shape[axis])
            found += parts[::-1]
        return value[tuple(found)]

    return Tensor(target, value.dtype, element)


def _groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Runs of axes with equal numbers of elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [*range(i, min(i + 1, len(old)))], [*range(j, min(j + 1, len(new)))]
        while True:
            one, other = (product_of([s[x] for x in r]) for s, r in ((old, a), (new, b)))
            if one is other:
                break
            grows_old = not divided(other, one)[1].terms
            if grows_old and i + len(a) < len(old):
                a.append(i + len(a))
            elif not grows_old and j + len(b) < len(new):
                b.append(j + len(b))
            elif i + len(a) == len(old) and j + len(b) == len(new):
                raise UnprovableError("the axes of a reshape do not fit together")
            else:
                a, b = list(range(i, len(old))), list(range(j, len(new)))
        groups.append((a, b))
        i, j = i + len(a), j + len(b)
    return groups


def place_of(value: Expr) -> Poly:
    """An integer as an index, with those that tensors hold in normal form.

    Raises:
        UnprovableError: there are too many cases.
    """
    known = as_integer(value)
    if known is not None:
        return known
    try:
        return index_of(Normalizer().of(value))
    except TooLargeError as error:
        raise UnprovableError("there are too many cases of an index") from error


def gather(value: Tensor, axis: int, places: Tensor) -> Tensor:
    """Elements along an axis, at integers that are not negative."""
    axis = value.axis(axis)
    shape = (*value.shape[:axis], *places.shape, *value.shape[axis + 1 :])

    def element(index: Index) -> Expr:
        place = place_of(places[index[axis : axis + places.rank]])
        before, behind = index[:axis], index[axis + places.rank :]
        return value[(*before, wrapped(place, value.shape[axis]), *behind)]

    return Tensor(shape, value.dtype, element)


def gather_elements(value: Tensor, axis: int, places: Tensor) -> Tensor:
    """Elements along an axis, at an integer for each element of the result."""
    axis = value.axis(axis)
    pairs = enumerate(zip(places.shape, value.shape, strict=True))
    if not all(other == axis or holds(size - part) for other, (part, size) in pairs):
        raise UnprovableError("more places are looked up than there are elements")

    def element(index: Index) -> Expr:
        place = wrapped(place_of(places[index]), value.shape[axis])
        return value[(*index[:axis], place, *index[axis + 1 :])]

    return Tensor(places.shape, value.dtype, element)


def wrapped(place: Poly, size: Poly) -> Poly:
    """An index that is not negative.

    Raises:
        UnprovableError: it may be.
    """
    known = place.constant
    if known is not None and known < 0:
        place = place + size
    if not holds(place) and not any(atom.kind == "data" for atom in place.atoms):
        raise UnprovableError(f"the index {place.name} may be negative")
    return place

"""Linear maps read from a graph: the matrix of a site, for every form of its nodes.

A `Reading` is the operand of a stored matrix as a function of a site's input x: x itself, its
group-sums, its padded groups, or a concatenation of these. Each is a map R by a matrix of zeros and
ones. A `Linear` is `y = M (R x) + b`; its effective weight `M R` is computed by rows, in float64,
so that only some rows of one layer are in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qalora_compile.errors import QaloraError
from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor

_ROUNDINGS = 8
"""Roundings of a coefficient that a kernel computes from codes: three, with a margin."""
INT8, TWO_DIGITS = "int8 activations", "activations of two int8 digits"
THREE_DIGITS = "activations of three int8 digits"
"""Notes on layers that round their input at run time."""


class NotLinearError(QaloraError):
    """A value is not a linear map in a form that this package writes; the text says why."""


@dataclass(frozen=True)
class Rows:
    """Some rows of an effective weight.

    Attributes:
        weight: `[n, K]` float64.
        size: `[n, K]`: the sum of the absolute values of the parts that a weight is computed from.
        radius: `[n, K]`: how far rounding for storage, and the float64 arithmetic of the decoder,
            may have changed a weight.
        coarse: The largest radius of a group relative to its scale; below ½, every change of a code
            is detected.
    """

    weight: Array
    size: Array
    radius: Array
    coarse: float = 0.0

    def map(self, function: Callable[[Array], Array]) -> Rows:
        """All three after the same linear function."""
        parts = function(self.weight), function(self.size), function(self.radius)
        return Rows(*parts, self.coarse)


@dataclass(frozen=True)
class Reading:
    """`R x`, with R a matrix of zeros and ones with `width` rows and a column for each of x.

    Attributes:
        source: The operands that it is computed from: x, and for experts their group offsets.
        width: Number of values of `R x`.
        pull: `M R` from M `[n, width]`.
        sums: Whether R is the group-sum, possibly padded.
        digits: (begin, width) of the columns of each group-sum that is appended to the rest.
        terms: Largest number of roundings of one value when `R x` is computed.
    """

    source: tuple[Any, ...]
    width: int
    pull: Callable[[Array], Array]
    sums: bool = False
    digits: tuple[tuple[int, int], ...] = ()
    terms: int = 0


@dataclass(frozen=True)
class Linear:
    """`y = M (R x) + b`, E of them for experts.

    Attributes:
        source: As for `Reading`.
        n, k: Rows and columns of the effective weight.
        rows: Returns the rows of a slice, of one expert if there are several.
        bias: The stored vectors that are added.
        experts: E, or None.
        notes: Notes, for example on int8 activations.
        terms: Largest number of roundings of one product when y is computed, in any order.
    """

    source: tuple[Any, ...]
    n: int
    k: int
    rows: Callable[[slice, int], Rows]
    bias: tuple[StoredTensor, ...] = ()
    experts: int | None = None
    notes: tuple[str, ...] = ()
    terms: int = 0

    def biases(self) -> Array:
        """B `[N]`, in float64."""
        total = np.zeros(self.n)
        for stored in self.bias:
            total = total + stored.wide().reshape(-1)
        return total


def identity(source: tuple[Any, ...], k: int) -> Reading:
    """The reading x itself."""
    return Reading(source, k, lambda m: m)


def group_sums(inner: Reading, group_size: int) -> Reading:
    """Sums of each `group_size` values of an `inner` reading."""
    width = -(-inner.width // group_size)

    def pull(m: Array) -> Array:
        return inner.pull(np.repeat(m, group_size, axis=1)[:, : inner.width])

    return Reading(inner.source, width, pull, sums=True, terms=inner.terms + group_size)


def pad_groups(inner: Reading, group_size: int, width: int) -> Reading:
    """Each group padded with zeros to `width`."""
    groups = -(-inner.width // group_size)

    def pull(m: Array) -> Array:
        each = m.reshape(len(m), groups, width)[:, :, :group_size]
        return inner.pull(each.reshape(len(m), -1)[:, : inner.width])

    return Reading(inner.source, groups * width, pull, terms=inner.terms)


def padded(inner: Reading, amount: int) -> Reading:
    """Zeros appended."""
    width = inner.width + amount
    return dataclasses.replace(inner, width=width, pull=lambda m: inner.pull(m[:, : inner.width]))


def side_by_side(parts: list[Reading]) -> Reading:
    """Several readings of one x, concatenated along the last axis.

    Raises:
        NotLinearError: they read different inputs.
    """
    if any(part.source != parts[0].source for part in parts):
        raise NotLinearError("values of different inputs are concatenated")
    begins = np.cumsum([0, *(part.width for part in parts)]).tolist()
    digits = [(b, p.width) for b, p in zip(begins, parts, strict=False) if p.sums]

    def pull(m: Array) -> Array:
        pieces = zip(begins, parts, strict=False)
        total: Array = sum(p.pull(m[:, b : b + p.width]) for b, p in pieces)  # type: ignore[assignment]
        return total

    terms = max(part.terms for part in parts)
    return Reading(parts[0].source, begins[-1], pull, digits=tuple(digits), terms=terms)


def applied(
    reading: Reading,
    n: int,
    rows: Callable[[slice, int], Rows],
    *,
    experts: int | None = None,
    bias: tuple[StoredTensor, ...] = (),
    notes: tuple[str, ...] = (),
    terms: int = _ROUNDINGS,
) -> Linear:
    """A stored matrix, `[n, width of the reading]` by rows, on a reading.

    `terms`: number of roundings of a coefficient itself.
    """

    def pulled(part: slice, expert: int) -> Rows:
        made = rows(part, expert)
        if made.weight.shape[1] != reading.width:
            raise NotLinearError(
                f"the matrix has {made.weight.shape[1]} columns, the operand {reading.width}"
            )
        return made.map(reading.pull)

    # The number of columns of x is known after one row: a reading knows only its own width.
    k = reading.pull(np.zeros((1, reading.width))).shape[1]
    terms += reading.terms + reading.width
    return Linear(reading.source, n, k, pulled, bias, experts, notes, terms)


def looked_up(
    source: tuple[Any, ...], n: int, k: int, rows: Callable[[slice, int], Rows]
) -> Linear:
    """Rows of a stored matrix `[n, k or more]` by number: its transpose on zeros and a one.

    The largest singular value is that of the matrix, so that bounds hold as for any other map.
    """

    def cut(part: slice, expert: int) -> Rows:
        made = rows(part, expert)
        if made.weight.shape[1] < k:
            raise NotLinearError(f"rows of {made.weight.shape[1]} values are looked up as {k}")
        return made.map(lambda m: m[:, :k])

    return Linear(source, n, k, cut, terms=_ROUNDINGS)


def added(first: Linear, second: Linear) -> Linear:
    """The sum of two.

    Raises:
        NotLinearError: they differ in input or size.
    """
    if first.source != second.source:
        raise NotLinearError("two parts of the layer read different inputs")
    if (first.n, first.k, first.experts) != (second.n, second.k, second.experts):
        raise NotLinearError(
            f"{first.n}×{first.k} and {second.n}×{second.k} are added, which differ in shape"
        )

    def rows(part: slice, expert: int) -> Rows:
        a, b = first.rows(part, expert), second.rows(part, expert)
        coarse = max(a.coarse, b.coarse)
        return Rows(a.weight + b.weight, a.size + b.size, a.radius + b.radius, coarse)

    bias, notes = (*first.bias, *second.bias), (*first.notes, *second.notes)
    terms = max(first.terms, second.terms) + 1
    return Linear(first.source, first.n, first.k, rows, bias, first.experts, notes, terms)


def composed(inner: Linear, n: int, matrix: Callable[[slice, int], Rows]) -> Linear:
    """A stored matrix `[n, inner.n]` applied to the result of a linear map.

    Raises:
        NotLinearError: there is a bias between the two.
    """
    if inner.bias:
        raise NotLinearError("a bias is added before a matrix")

    def rows(part: slice, expert: int) -> Rows:
        outer, below = matrix(part, expert), inner.rows(slice(0, inner.n), expert)
        if outer.weight.shape[1] != inner.n:
            raise NotLinearError(
                f"{outer.weight.shape[1]} columns do not chain with {inner.n} rows"
            )
        size = outer.size @ below.size
        slack = (inner.n + 32) * 2.0**-52 * size
        return Rows(outer.weight @ below.weight, size, outer.size @ below.radius + slack)

    terms = inner.terms + inner.n + _ROUNDINGS
    return dataclasses.replace(inner, n=n, rows=rows, terms=terms)


def scaled(inner: Linear, factor: float) -> Linear:
    """A linear map times a number."""
    if inner.bias:
        raise NotLinearError("a bias is scaled")

    def rows(part: slice, expert: int) -> Rows:
        made = inner.rows(part, expert)
        return Rows(made.weight * factor, made.size * abs(factor), made.radius * abs(factor))

    return dataclasses.replace(inner, rows=rows, terms=inner.terms + 1)


def remembered(linear: Linear) -> Linear:
    """The same map with a cache of the last rows."""
    last: list[tuple[slice, int, Rows]] = []

    def rows(part: slice, expert: int) -> Rows:
        if not last or last[0][:2] != (part, expert):
            last[:] = [(part, expert, linear.rows(part, expert))]
        return last[0][2]

    return dataclasses.replace(linear, rows=rows)


def part_of(linear: Linear, sizes: Sequence[int], index: int) -> Linear:
    """Part `index` of the outputs of a linear map that are split by `sizes`.

    Raises:
        NotLinearError: it has another number of outputs, a bias, or several experts.
    """
    fits = sum(sizes) == linear.n and min(sizes) > 0 and 0 <= index < len(sizes)
    if not fits or linear.bias or linear.experts is not None:
        raise NotLinearError(f"{linear.n} outputs are split into {list(sizes)}: no layers")
    begin = sum(sizes[:index])

    def rows(part: slice, expert: int) -> Rows:
        return linear.rows(slice(begin + part.start, begin + part.stop), expert)

    return dataclasses.replace(linear, n=sizes[index], rows=rows)


def with_bias(linear: Linear, bias: StoredTensor) -> Linear:
    """A linear map plus a stored vector.

    Raises:
        NotLinearError: it has another length.
    """
    if bias.size != linear.n or bias.shape[-1] != linear.n:
        raise NotLinearError(
            f"the vector {bias.name} {list(bias.shape)} is added to {linear.n} outputs"
        )
    return dataclasses.replace(linear, bias=(*linear.bias, bias), terms=linear.terms + 1)

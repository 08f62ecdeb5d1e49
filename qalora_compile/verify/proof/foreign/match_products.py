"""Finds for each layer of a program the layer of another graph that holds its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qalora_compile.verify.proof.foreign.products import HEAD, Product
from qalora_compile.verify.proof.graphs.graph import Tensor
from qalora_compile.verify.proof.graphs.stored_tensor import Array

_ALIKE = 0.9
"""The least cosine of the first rows of codes with those that they stand for (`HEAD`)."""
FARTHEST = 0.5
"""The largest distance of a row of codes from that row, relative to its length."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Matched:
    """A product of the program, and the rows of a product of the file that hold its matrix.

    Attributes:
        one, other: The two products.
        first: The first of its rows there.
        distance: ‖ΔW‖ / ‖W‖ for codes; 0 means equal.
        far: A row of codes that does not stand for that of the program, or None.
    """

    one: Product
    other: Product
    first: int
    distance: float = 0.0
    far: int | None = None

    def rows(self, part: slice) -> Array:
        """Rows of the file's matrix, counted as the program's are."""
        return self.other.rows(slice(self.first + part.start, self.first + part.stop))


def matched(ones: Sequence[Product], others: Sequence[Product]) -> list[Matched]:
    """Pairs in the order of the file; each product is in at most one, and some may be in none.

    Matrices that one operator holds on top of each other are pairs of their own.
    """
    left = list(ones)
    return [pair for other in others for pair in _parts(left, other)]


def _parts(left: list[Product], other: Product) -> list[Matched]:
    """The pairs of a product of the file, if they hold all of its rows."""
    found: list[Matched] = []
    first = 0
    while first < other.n:
        taken = [pair.one for pair in found]
        fits = (
            o
            for o in left
            if o.k == other.k
            and o.n <= other.n - first
            and o.lookup == other.lookup
            and not any(o is t for t in taken)
        )
        pair = _nearest(list(fits), other, first) if other.coded else _equal(fits, other, first)
        if pair is None:
            return []
        found.append(pair)
        first += pair.one.n
    if len(found) > 1 and not isinstance(other.bias, Tensor | None):
        return []
    for pair in found:
        left[:] = [one for one in left if one is not pair.one]
    return found


def _equal(fits: Iterator[Product], other: Product, first: int) -> Matched | None:
    head = other.rows(slice(first, first + 1))
    for one in fits:
        if np.array_equal(one.head[:1], head) and all(
            np.array_equal(one.rows(p), other.rows(slice(first + p.start, first + p.stop)))
            for p in slices(one.n, one.k)
        ):
            return Matched(one, other, first)
    return None


def _nearest(fits: list[Product], other: Product, first: int) -> Matched | None:
    head = other.rows(slice(first, min(first + HEAD, other.n)))
    scored = [(_cosine(one.head, head[: len(one.head)]), i) for i, one in enumerate(fits)]
    best, place = max(scored, key=lambda pair: (pair[0], -pair[1]), default=(0.0, 0))
    if best < _ALIKE:
        return None
    pair = Matched(fits[place], other, first)
    squares = total = 0.0
    far: int | None = None
    for part in slices(pair.one.n, pair.one.k):
        wanted = pair.one.rows(part)
        apart = np.linalg.norm(pair.rows(part) - wanted, axis=1)
        lengths = np.linalg.norm(wanted, axis=1)
        squares += float((apart**2).sum())
        total += float((lengths**2).sum())
        wrong = np.flatnonzero(apart > FARTHEST * lengths)
        if far is None and len(wrong):
            far = part.start + int(wrong[0])
    return Matched(pair.one, other, first, float(np.sqrt(squares / max(total, 1e-300))), far)


def _cosine(one: Array, other: Array) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one * other).sum()) / lengths if lengths else 0.0


def slices(n: int, k: int) -> Iterator[slice]:
    """All rows of a matrix, some at a time."""
    step = max(1, _CHUNK // max(k, 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))

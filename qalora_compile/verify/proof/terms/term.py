"""Terms: what a value is computed by, in a form that torch.fx and ONNX graphs have in common.

A term is hashed over its whole computation, so that equal hashes mean equal computations: names,
the order of independent nodes and the grouping and order of sums and products do not count. What
both kinds of graphs say in their own operators (`silu`, `Sigmoid` and `Mul`) becomes the same term;
an operator without such a form stays as it is, `foreign` to the other kind of graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qalora_compile.untrusted.element_types import FLOATS, PROGRAM_TYPES
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor, digest_of

SUM, PRODUCT = "sum", "product"
INTEGERS = tuple(kind.name for kind in PROGRAM_TYPES if kind.name not in FLOATS)
UNKNOWN = "?"
"""A dtype that is not known."""
_COMMUTATIVE = (SUM, PRODUCT)
_NEUTRAL = {SUM: 0, PRODUCT: 1}
_EXACT = 1 << 24
"""Integers up to which float32 holds each."""
_SMALL = 1 << 16
"""Elements up to which a stored matrix is turned to compare it with one that was stored turned."""


@dataclass(frozen=True, eq=False)
class Term:
    """A computation.

    Attributes:
        op: What computes it; of `const` and `number` terms, what kind of leaf it is.
        detail: Options and values, as text.
        args: Operands.
        key: The hash.
        line: The node as text, for messages.
        dialect: Of a foreign operator: the kind of graph that it is of; else empty.
        dialects: Of all foreign operators inside.
        dtype: Of the value, where it is known.
        stored: Of a constant.
    """

    op: str
    detail: str
    args: tuple[Term, ...]
    key: str
    line: str
    dialect: str
    dialects: frozenset[str]
    dtype: str | None
    stored: StoredTensor | None = None

    def __str__(self) -> str:
        return self.line


def term(
    op: str,
    args: Sequence[Term] = (),
    detail: object = "",
    *,
    line: str = "",
    dialect: str = "",
    dtype: str | None = None,
    stored: StoredTensor | None = None,
) -> Term:
    """A term; operands of commutative operators are put in order."""
    given = tuple(sorted(args, key=lambda t: t.key) if op in _COMMUTATIVE else args)
    text = f"{dialect}|{op}|{detail}|" + ",".join(t.key for t in given)
    key = hashlib.sha256(text.encode()).hexdigest()
    inside = frozenset[str]().union(*(t.dialects for t in given))
    if dialect:
        inside |= {dialect}
    if dtype is None and given:
        dtype = _common_dtype(given)
    return Term(op, str(detail), given, key, line, dialect, inside, dtype, stored)


def _common_dtype(args: Sequence[Term]) -> str:
    """The dtype of floating operands that have one; else `?`: a cast of the result may round."""
    found = {t.dtype for t in args if t.op != "number"}
    only = next(iter(found)) if len(found) == 1 else None
    return only if only is not None and only in FLOATS else UNKNOWN


class Algebra:
    """Makes terms of sums, products, numbers and constants.

    Args:
        single: Numbers are compared as float32: ONNX stores them so.
        halves: Casts to half precision count as none: one side computes in float32 what the other
            does in half precision.

    Attributes:
        widened: A constant in half precision was taken as widened to float32.
    """

    def __init__(self, *, single: bool, halves: bool) -> None:
        self.single, self.halves, self.widened = single, halves, False
        self._widens = single or halves
        self._transposed: dict[str, str] = {}

    def number(
        self, value: float, line: str = "", *, single: float | None = None, exact: bool = False
    ) -> Term:
        """A number; a whole one of Python's stays whole.

        Args:
            value: The number.
            line: As text.
            single: What it is where every number that it is computed from is rounded to float32.
            exact: It is compared as it is: what it stands beside is float64.
        """
        short = self._rounded(value if single is None else single)
        shown = value if exact else short
        key = hashlib.sha256(f"number|{shown!r}".encode()).hexdigest()
        detail = repr(value) if value == short else f"{value!r} {short!r}"
        return Term("number", detail, (), key, line or repr(shown), "", frozenset(), None)

    def _rounded(self, value: float) -> float:
        return value if isinstance(value, int) else self.rounded(value)

    def rounded(self, value: float) -> float:
        """A number as an attribute of an ONNX node holds it, where one side is ONNX."""
        with np.errstate(over="ignore"):  # of what float32 does not hold, ONNX has an infinity
            return float(np.float32(value)) if self.single else float(value)

    def sum(self, parts: Sequence[Term], line: str = "") -> Term:
        """A sum; sums inside it are taken apart, and numbers added."""
        return self._combine(SUM, parts, line)

    def product(self, parts: Sequence[Term], line: str = "") -> Term:
        """A product; products inside it are taken apart, and numbers multiplied."""
        return self._combine(PRODUCT, parts, line)

    def negated(self, value: Term, line: str = "") -> Term:
        """−x."""
        return self.product([self.number(-1), value], line)

    def inverse(self, value: Term, line: str = "") -> Term:
        """1 / x."""
        found = as_number(value), as_number(value, exact=True)
        if found[0] and found[1]:
            return self.number(1.0 / found[1], line, single=1.0 / found[0])
        return term("reciprocal", [value], line=line)

    def cast(self, value: Term, dtype: str | None, line: str = "") -> Term:
        """A cast; none where the value has that type."""
        if dtype is None or value.dtype == dtype:
            return value
        if self.halves and dtype in FLOATS and value.dtype in FLOATS:
            return value
        return term("cast", [value], dtype, line=line, dtype=dtype)

    def constant(self, stored: StoredTensor, *, turned: bool = False) -> Term:
        """A stored tensor; one without axes is a number, a turned matrix is the matrix turned."""
        if self._is_number(stored):
            value = stored.wide() if stored.dtype in FLOATS else stored.values()
            number = self.number(value.reshape(-1)[0].item(), f"@{stored.name}")
            return dataclasses.replace(number, stored=stored)
        line = f"@{stored.name}: {stored.dtype}{list(stored.shape)}"
        dtype = "float32" if stored.widened and self.halves else stored.dtype
        self.widened |= stored.widened and self._widens
        kind = f" {stored.dtype}" if stored.widened and not self._widens else ""
        if not turned or stored.size <= _SMALL:
            key = self._transposed_digest(stored) if turned else stored.digest
            return term("const", (), key + kind, line=line, dtype=dtype, stored=stored)
        detail = f"{stored.digest}{kind} turned"
        return term("const", (), detail, line=line, dtype=dtype, stored=stored)

    def _is_number(self, stored: StoredTensor) -> bool:
        """Whether a tensor counts as Python's number does: its type then decides no result's."""
        if stored.shape != ():
            return False
        if stored.dtype in FLOATS:
            return self._widens or stored.dtype == "float32"
        return stored.dtype == "int64" or (self.single and stored.dtype in INTEGERS[1:])

    def _transposed_digest(self, stored: StoredTensor) -> str:
        if stored.digest not in self._transposed:
            self._transposed[stored.digest] = digest_of(np.ascontiguousarray(stored.values().T))
        return self._transposed[stored.digest]

    def _combine(self, op: str, parts: Sequence[Term], line: str) -> Term:
        flat: list[Term] = []
        for part in parts:
            flat += part.args if part.op == op else (part,)
        numbers = [part for part in flat if part.op == "number"]
        rest = self._promoted([part for part in flat if part.op != "number"])
        total, single = (_folded(op, numbers, exact=exact) for exact in (True, False))
        if not rest:
            return self.number(total, single=single)
        dtypes = {part.dtype for part in rest}
        floating = not dtypes.isdisjoint(FLOATS)
        # A float number makes floats of integers, even where it changes no value.
        if total != _NEUTRAL[op] or not (isinstance(total, int) or floating):
            unsure = self.single and abs(total) <= _EXACT  # what is foreign has no known type
            if floating or (unsure and UNKNOWN in dtypes):
                total, single = float(total), float(single)
            rest.append(self.number(total, single=single, exact="float64" in dtypes))
        return rest[0] if len(rest) == 1 else term(op, rest, line=line)

    def _promoted(self, parts: list[Term]) -> list[Term]:
        """Integers beside floats as floats: ATen casts them, ONNX has a node that does."""
        floats = {part.dtype for part in parts if part.dtype in FLOATS}
        if len(floats) != 1:
            return parts
        (dtype,) = floats
        return [self.cast(p, dtype, p.line) if p.dtype in INTEGERS else p for p in parts]


def _folded(op: str, numbers: Sequence[Term], *, exact: bool) -> float:
    """The sum or product of numbers."""
    total: float = _NEUTRAL[op]
    for number in numbers:
        value = as_number(number, exact=exact)
        assert value is not None
        total = total + value if op == SUM else total * value
    return total


def as_number(value: Term, *, exact: bool = False) -> float | None:
    """The value of a number, an `int` where it is whole and Python's.

    `exact`: before anything was rounded to float32.
    """
    if value.op != "number":
        return None
    text = value.detail.split()[0 if exact else -1]
    return int(text) if text.removeprefix("-").isdigit() else float(text)


@dataclass(frozen=True)
class Difference:
    """Where two computations part.

    Attributes:
        reference: The node of the reference as text.
        candidate: The node of the candidate.
        known: Both are in terms of both graphs: the computations do differ there.
    """

    reference: str
    candidate: str
    known: bool


def differences(a: Term, b: Term, *, mixed: bool) -> list[Difference]:
    """Where two computations part, outermost first; nothing if they are the same.

    Args:
        a: A computation.
        b: Another.
        mixed: They are of graphs of two kinds, so that each has operators foreign to the other.
    """
    found: list[Difference] = []
    waiting: list[tuple[Term, Term]] = [(a, b)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        first, second = waiting.pop()
        if first.key == second.key or (first.key, second.key) in seen:
            continue
        seen.add((first.key, second.key))
        pairs = _pairs(first, second)
        if pairs is None:
            known = _known(first, second, mixed) or _other_options(first, second)
            found.append(Difference(first.line, second.line, known))
            continue
        for left, right in pairs:
            if left is not None and right is not None:
                waiting.append((left, right))
            else:
                one = left.line if left is not None else f"(nothing like it in) {first.line}"
                other = right.line if right is not None else f"(nothing like it in) {second.line}"
                found.append(Difference(one, other, _known(left, right, mixed)))
    return found


def _other_options(a: Term, b: Term) -> bool:
    """Whether two terms are one operator with other options: whatever it reads, a difference.

    Casts are none: what is foreign may have another type on either side.
    """
    return a.op == b.op != "cast" and not a.dialect and not b.dialect and a.detail != b.detail


def _pairs(a: Term, b: Term) -> list[tuple[Term | None, Term | None]] | None:
    """Operands to compare in place of two terms; None where the terms themselves differ."""
    same = (a.op, a.detail, a.dialect) == (b.op, b.detail, b.dialect)
    if not same or not a.args:
        return None
    if a.op not in _COMMUTATIVE:
        return list(zip(a.args, b.args, strict=True)) if len(a.args) == len(b.args) else None
    left, right = _without(a.args, b.args), _without(b.args, a.args)
    left, right = (sorted(side, key=_shape) for side in (left, right))
    alike = [(one, other) for one in left for other in right if _shape(one) == _shape(other)]
    paired: list[tuple[Term | None, Term | None]] = []
    for one, other in sorted(alike, key=lambda pair: -_shared(*pair)):
        if one in left and other in right:
            left.remove(one)
            right.remove(other)
            paired.append((one, other))
    if len(left) == len(right):
        return [*paired, *zip(left, right, strict=True)]
    return [*paired, *((one, None) for one in left), *((None, one) for one in right)]


def _shape(value: Term) -> tuple[str, str, int]:
    return (value.dialect, value.op, len(value.args))


def _shared(a: Term, b: Term) -> int:
    """How many operands two terms have in common: two lookups in one table are alike."""
    return len({t.key for t in a.args} & {t.key for t in b.args})


def _without(these: Sequence[Term], those: Sequence[Term]) -> list[Term]:
    """Those of `these` that are not in `those`, each as often as it is more often here."""
    counts = Counter(t.key for t in those)
    left = []
    for one in these:
        if counts[one.key]:
            counts[one.key] -= 1
        else:
            left.append(one)
    return left


def _known(a: Term | None, b: Term | None, mixed: bool) -> bool:
    """Whether a difference is one: not where an operator is foreign to the other graph."""
    if mixed and a is not None and b is not None and _is_one_number(a, b):
        return False
    inside = frozenset[str]().union(*(t.dialects for t in (a, b) if t is not None))
    return not inside if mixed else len(inside) <= 1


def _is_one_number(a: Term, b: Term) -> bool:
    """Whether one is a number and the other a tensor of that one element: the axes may be lost."""
    number, other = (a, b) if a.op == "number" else (b, a)
    if other.op != "const" or other.stored is None or other.stored.size != 1:
        return False
    return as_number(number) == float(other.stored.wide().reshape(-1)[0])

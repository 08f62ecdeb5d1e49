"""Terms: the computation of a value, in a normal form for torch.fx and ONNX graphs.

A term is hashed over its complete computation, so that equal hashes mean equal computations: names,
the order of independent nodes and the grouping and order of sums and products do not count. What
both dialects express with their own operators (`silu`, or `Sigmoid` and `Mul`) becomes the same
term. An operator without such a form is opaque: it keeps its name and dialect.
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
"""An unknown dtype."""
_COMMUTATIVE = (SUM, PRODUCT)
_NEUTRAL = {SUM: 0, PRODUCT: 1}
_STORED = ("const", "number")
"""Leaves that a graph holds."""
_EXACT = 1 << 24
"""float32 holds every integer up to this one."""
_SMALL = 1 << 16
"""Matrices with at most this many elements are transposed to compare them with others."""


@dataclass(frozen=True, eq=False)
class Term:
    """A computation.

    Attributes:
        op: The operator; for leaves, their kind, such as `const` and `number`.
        detail: Options and values, as text.
        args: Operands.
        key: The hash.
        line: The node as text, for messages.
        dialect: The dialect of an opaque operator; empty for others.
        dialects: The dialects of all opaque operators inside.
        dtype: Dtype of the value, if it is known.
        stored: The tensor of a constant.
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
    """A term; operands of commutative operators are sorted."""
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
    """The common dtype of floating operands, otherwise `?`: a cast of the result may round."""
    found = {t.dtype for t in args if t.op != "number"}
    only = next(iter(found)) if len(found) == 1 else None
    return only if only is not None and only in FLOATS else UNKNOWN


class Algebra:
    """Makes terms of sums, products, numbers and constants.

    Args:
        single: Numbers are compared as float32, as ONNX stores them.
        halves: Casts to half precision are ignored, because one graph computes in float32 and the
            other in half precision.

    Attributes:
        widened: Whether a constant in half precision was widened to float32.
    """

    def __init__(self, *, single: bool, halves: bool) -> None:
        self.single, self.halves, self.widened = single, halves, False
        self._widens = single or halves
        self._transposed: dict[str, str] = {}

    def number(
        self, value: float, line: str = "", *, single: float | None = None, exact: bool = False
    ) -> Term:
        """A number; a Python `int` stays an integer.

        Args:
            value: The number.
            line: As text.
            single: Its value if every number that it is computed from is rounded to float32.
            exact: It is compared without rounding, because the other operands are float64.
        """
        short = self._rounded(value if single is None else single)
        shown = value if exact else short
        key = hashlib.sha256(f"number|{shown!r}".encode()).hexdigest()
        detail = repr(value) if value == short else f"{value!r} {short!r}"
        return Term("number", detail, (), key, line or repr(shown), "", frozenset(), None)

    def _rounded(self, value: float) -> float:
        return value if isinstance(value, int) else self.rounded(value)

    def rounded(self, value: float) -> float:
        """A number as an attribute of an ONNX node holds it, if one of the graphs is ONNX."""
        with np.errstate(over="ignore"):  # ONNX stores an infinity for numbers beyond float32
            return float(np.float32(value)) if self.single else float(value)

    def sum(self, parts: Sequence[Term], line: str = "") -> Term:
        """A sum; nested sums are flattened, and numbers added."""
        return self._combine(SUM, parts, line)

    def product(self, parts: Sequence[Term], line: str = "") -> Term:
        """A product; nested products are flattened, and numbers multiplied."""
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
        """A cast; the value itself if it has that type."""
        if dtype is None or value.dtype == dtype:
            return value
        if self.halves and dtype in FLOATS and value.dtype in FLOATS:
            return value
        return term("cast", [value], dtype, line=line, dtype=dtype)

    def constant(self, stored: StoredTensor, *, transposed: bool = False) -> Term:
        """A stored tensor, or its transpose; a tensor without axes is a number."""
        if self._is_number(stored):
            value = stored.wide() if stored.dtype in FLOATS else stored.values()
            number = self.number(value.reshape(-1)[0].item(), f"@{stored.name}")
            return dataclasses.replace(number, stored=stored)
        line = f"@{stored.name}: {stored.dtype}{list(stored.shape)}"
        dtype = "float32" if stored.widened and self.halves else stored.dtype
        self.widened |= stored.widened and self._widens
        kind = f" {stored.dtype}" if stored.widened and not self._widens else ""
        if not transposed or stored.size <= _SMALL:
            key = self._transposed_digest(stored) if transposed else stored.digest
            return term("const", (), key + kind, line=line, dtype=dtype, stored=stored)
        detail = f"{stored.digest}{kind} transposed"
        return term("const", (), detail, line=line, dtype=dtype, stored=stored)

    def _is_number(self, stored: StoredTensor) -> bool:
        """Whether a tensor counts as a Python number, which does not decide a result's type."""
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
        # A float converts integers to floats, even if it changes no value.
        if total != _NEUTRAL[op] or not (isinstance(total, int) or floating):
            unsure = self.single and abs(total) <= _EXACT  # opaque operands have no known type
            if floating or (unsure and UNKNOWN in dtypes):
                total, single = float(total), float(single)
            rest.append(self.number(total, single=single, exact="float64" in dtypes))
        return rest[0] if len(rest) == 1 else term(op, rest, line=line)

    def _promoted(self, parts: list[Term]) -> list[Term]:
        """Casts integer operands to the floating type of the others, as ATen does implicitly."""
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
    """The value of a number, an `int` if it is a Python integer.

    `exact`: the value before anything was rounded to float32.
    """
    if value.op != "number":
        return None
    text = value.detail.split()[0 if exact else -1]
    return int(text) if text.removeprefix("-").isdigit() else float(text)


@dataclass(frozen=True)
class Difference:
    """A point at which two computations diverge.

    Attributes:
        reference: The node of the reference as text.
        candidate: The node of the candidate.
        known: Whether the computations certainly differ there, without opaque operators.
    """

    reference: str
    candidate: str
    known: bool


def differences(a: Term, b: Term, *, mixed: bool) -> list[Difference]:
    """The points at which two computations diverge, outermost first; none if they are equal.

    Args:
        a: A computation.
        b: Another.
        mixed: Whether they have different dialects, so that operators of each may be opaque.
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
                one = left.line if left is not None else f"(no counterpart in) {first.line}"
                other = right.line if right is not None else f"(no counterpart in) {second.line}"
                found.append(Difference(one, other, _known(left, right, mixed)))
    return found


def _other_options(a: Term, b: Term) -> bool:
    """Whether two terms are one operator with different options, which is always a difference.

    Casts are excluded, because opaque operators may have different types in the two graphs.
    """
    return a.op == b.op != "cast" and not a.dialect and not b.dialect and a.detail != b.detail


def _pairs(a: Term, b: Term) -> list[tuple[Term | None, Term | None]] | None:
    """Operands to compare in place of two terms; None if the terms themselves differ."""
    same = (a.op, a.detail, a.dialect) == (b.op, b.detail, b.dialect)
    if not same or not a.args:
        return None
    if a.op not in _COMMUTATIVE:
        return list(zip(a.args, b.args, strict=True)) if len(a.args) == len(b.args) else None
    left, right = _without(a.args, b.args), _without(b.args, a.args)
    left, right = (sorted(side, key=_shape) for side in (left, right))
    same_shape = [(one, other) for one in left for other in right if _shape(one) == _shape(other)]
    paired: list[tuple[Term | None, Term | None]] = []
    for one, other in sorted(same_shape, key=lambda pair: -_shared(*pair)):
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
    """How many operands two terms have in common, such as the table of two lookups."""
    return len({t.key for t in a.args} & {t.key for t in b.args})


def _without(these: Sequence[Term], those: Sequence[Term]) -> list[Term]:
    """The multiset difference of `these` and `those`."""
    counts = Counter(t.key for t in those)
    left = []
    for one in these:
        if counts[one.key]:
            counts[one.key] -= 1
        else:
            left.append(one)
    return left


def _known(a: Term | None, b: Term | None, mixed: bool) -> bool:
    """Whether a difference is certain, which opaque operators of the other dialect prevent."""
    if mixed and a is not None and b is not None and (_is_one_number(a, b) or _is_folded(a, b)):
        return False
    inside = frozenset[str]().union(*(t.dialects for t in (a, b) if t is not None))
    return not inside if mixed else len(inside) <= 1


def _is_one_number(a: Term, b: Term) -> bool:
    """Whether one is a number and the other a tensor of only that element, without its axes."""
    number, other = (a, b) if a.op == "number" else (b, a)
    if other.op != "const" or other.stored is None or other.stored.size != 1:
        return False
    return as_number(number) == float(other.stored.wide().reshape(-1)[0])


def _is_folded(a: Term, b: Term) -> bool:
    """Whether one is stored and the other computed from what is stored: an exporter may fold it."""
    stored, computed = (a, b) if not a.args else (b, a)
    if stored.op not in _STORED or not computed.args:
        return False
    waiting, seen = [computed], {computed.key}
    while waiting:
        here = waiting.pop()
        if not here.args and here.op not in _STORED:
            return False
        waiting += [arg for arg in here.args if arg.key not in seen]
        seen |= {arg.key for arg in here.args}
    return True

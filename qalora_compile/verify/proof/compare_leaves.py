"""Leaves of two open computations that samples cannot distinguish: stored tensors and masks.

Operators without a common form are compared on samples, within the rounding of float32. There, a
parameter that differs by less than that would pass, and so would a mask of ones that is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor
from qalora_compile.verify.proof.terms.term import Term

_NEAR = 1e-2
"""Two tensors of one shape whose difference relative to the largest value is at most this are the
same parameter; larger differences show on samples."""
_SHAPES = ("size", "sym_size", "Shape", "zeros_like", "ones_like", "full_like", "empty_like")
"""Operators that read only the shape of an operand."""
_RESULTS: dict[str, dict[int, tuple[int, ...]]] = {
    "onnx.Attention": {1: (1, 4), 2: (2, 5)},
    "qalora.CachedAttention": {1: (1, 4), 2: (2, 5)},
    "com.microsoft.MultiHeadAttention": {1: (1, 3, 6), 2: (2, 3, 7)},
}
"""Operands that a result depends on, if not all: a cache does not depend on the mask."""


def parted(a: Term, b: Term) -> tuple[str, str] | None:
    """Two leaves, as text, in which two open computations differ: stored tensors or masks."""
    return _parted_tensors(a, b) or _parted_masks(a, b)


def _parted_tensors(a: Term, b: Term) -> tuple[str, str] | None:
    """The first stored tensor that both have with different values."""
    ours, theirs = _tensors(a), _tensors(b)
    keys = {key for key, _ in ours}, {key for key, _ in theirs}
    left = [s for key, s in ours if key not in keys[1]]
    right = [s for key, s in theirs if key not in keys[0]]
    named = {stored.name: stored for stored in right}
    for stored in left:
        other = named.get(stored.name)
        others = right if other is None else [other]
        found = [_relation(stored, o, by_name=other is not None) for o in others]
        if "same" not in found and "parted" in found:
            return _shown(stored), _shown(others[found.index("parted")])
    return None


def _relation(a: StoredTensor, b: StoredTensor, *, by_name: bool) -> str:
    """`same`, `parted` (one parameter with different values), or "" for unrelated tensors."""
    if a.size != b.size or _kind(a) != _kind(b):
        return ""
    if a.digest == b.digest:
        return "same"
    transposed = a.shape != b.shape and a.shape == b.shape[::-1]
    if not by_name and a.shape != b.shape and not transposed:
        return ""
    x, y = a.values(), b.values()
    pairs = [(x.reshape(-1), y.reshape(-1))]
    if len(a.shape) == 2 and a.shape in (b.shape, b.shape[::-1]):
        pairs.append((x.reshape(-1), y.T.reshape(-1)))
    if any(np.array_equal(one, other) for one, other in pairs):
        return "same"
    return "parted" if by_name or any(_near(*pair) for pair in pairs) else ""


def _near(a: Array, b: Array) -> bool:
    if a.dtype.kind != "f":
        return False
    return float(np.abs(a - b).max()) <= _NEAR * float(np.abs(a).max())


def _kind(stored: StoredTensor) -> str:
    return "float32" if stored.widened else stored.dtype


def _shown(stored: StoredTensor) -> str:
    return f"@{stored.name}: {stored.dtype}{list(stored.shape)}"


def _parted_masks(a: Term, b: Term) -> tuple[str, str] | None:
    """A mask that only one computation reads, which samples may not show."""
    ours, theirs = _masks(a), _masks(b)
    for line in ours.keys() ^ theirs.keys():
        absent = f"(does not read {line})"
        return (ours[line], absent) if line in ours else (absent, theirs[line])
    return None


def _masks(value: Term) -> dict[str, str]:
    found = _walk(value, _read)
    return {t.detail: t.line for t in found if t.op == "input" and "mask" in t.detail}


def _read(value: Term) -> tuple[Term, ...]:
    """The operands whose values matter."""
    if _base(value.op) in _SHAPES:
        return ()
    parts = value.detail.split(", ")
    result = next((int(p.removeprefix("result ")) for p in parts if p.startswith("result ")), 0)
    places = _RESULTS.get(value.op, {}).get(result)
    if places is None:
        return value.args
    operands = iter(value.args)  # one for each dot
    by_place = {place: next(operands) for place, part in enumerate(parts) if part == "·"}
    return tuple(by_place[place] for place in places if place in by_place)


def _tensors(value: Term) -> list[tuple[str, StoredTensor]]:
    return [(t.key, t.stored) for t in _walk(value, lambda t: t.args) if t.stored is not None]


def _base(op: str) -> str:
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op


def _walk(value: Term, operands: Callable[[Term], Sequence[Term]]) -> Iterator[Term]:
    """A term and all terms that are reached from it by `operands`, each once."""
    waiting, seen = [value], {value.key}
    while waiting:
        here = waiting.pop()
        yield here
        for arg in operands(here):
            if arg.key not in seen:
                seen.add(arg.key)
                waiting.append(arg)

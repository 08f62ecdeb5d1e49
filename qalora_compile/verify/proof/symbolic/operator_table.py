"""Tables of ATen's operators: their operands, in order, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qalora_compile.verify.proof.symbolic.expression import index_of
from qalora_compile.verify.proof.symbolic.operators import literal
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError

Arguments = Mapping[str, Any]
Meaning = Callable[[Arguments], Any]
_PLACEMENT = ("device", "layout", "pin_memory", "non_blocking", "copy", "memory_format")
"""Operands that change no value."""


class OperatorTable(dict[str, tuple[tuple[str, ...], Meaning]]):
    """Operators by name."""

    def means(self, ops: str, operands: str) -> Callable[[Meaning], Meaning]:
        """Declare the meaning of operators with these operands, in order."""

        def declare(meaning: Meaning) -> Meaning:
            for op in ops.split():
                self[op] = (tuple(operands.split()), meaning)
            return meaning

        return declare

    def value(self, op: str, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """The value of a node, from its operands.

        Raises:
            UnprovableError: the operator, or an operand of it, has no meaning here.
        """
        if op not in self:
            plain = _not_in_place(op)
            if plain not in self:
                raise UnprovableError("it has no symbolic form")
            target, *_ = args
            return _kept(target, self.value(plain, args, options))
        names, meaning = self[op]
        if len(args) > len(names):
            raise UnprovableError(f"it has {len(args)} operands")
        given = dict(zip(names, args, strict=False)) | dict(options)
        unknown = sorted(given.keys() - {*names, *_PLACEMENT})
        if unknown:
            raise UnprovableError(f"its option {unknown[0]} is not known")
        return meaning(given)


def _not_in_place(op: str) -> str:
    """The operator that computes what an in-place one writes, as `aten.add.Tensor`."""
    library, _, name = op.partition(".")
    base, _, overload = name.partition(".")
    return f"{library}.{base.removesuffix('_')}.{overload}" if base[-2:-1] != "_" else op


def _kept(target: Any, value: Any) -> Tensor:
    """What is written in the place of a tensor, which keeps its shape and dtype.

    That nothing reads the tensor's old values is checked before (`refuse_hidden_writes`).
    """
    if (value.shape, value.dtype) != (target.shape, target.dtype):
        raise UnprovableError("it writes values of another shape or dtype in place")
    found: Tensor = value
    return found


def tensor_of(value: Any) -> Tensor:
    """An operand that may be a Python number."""
    return value if isinstance(value, Tensor) else literal(value)


def size_of(value: Any) -> Poly:
    """A size or position: a number, or a value that is known as a polynomial."""
    if isinstance(value, (int, Poly)):
        return as_poly(value)
    if isinstance(value, Tensor) and value.rank == 0:
        return index_of(value[()])
    raise UnprovableError(f"the size {value!r}")


def sizes_of(values: Sequence[Any]) -> list[Poly]:
    """Sizes, one for each axis."""
    return [size_of(value) for value in values]

"""Shared by the contract suites: clauses, refusals, and the comparison of two programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from qalora_compile.errors import QaloraError
from qalora_compile.ir.lazy_tensor import materialize
from qalora_compile.ir.program import Program


class ContractError(AssertionError):
    """An extension breaks a clause of its contract.

    Attributes:
        subject: The extension that was checked.
        clause: The clause, as the suite's docstring has it.
        why: The violation that was found.
    """

    def __init__(self, subject: str, clause: str, why: str) -> None:
        super().__init__(f"{subject} breaks its contract\n  clause: {clause}\n  found:  {why}")
        self.subject, self.clause, self.why = subject, clause, why


class Contract:
    """The clauses of one extension.

    Args:
        subject: The extension, as messages name it.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def need(self, clause: str, holds: bool, why: str) -> None:
        """Fail where a clause does not hold.

        Raises:
            ContractError: it does not.
        """
        __tracebackhide__ = True
        if not holds:
            raise ContractError(self.subject, clause, why)

    @contextmanager
    def clause(self, clause: str) -> Iterator[None]:
        """The clause is broken if the block raises anything."""
        __tracebackhide__ = True
        try:
            yield
        except ContractError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ContractError(self.subject, clause, why) from error

    @contextmanager
    def refuses(self, clause: str, kind: type[QaloraError] = QaloraError) -> Iterator[None]:
        """The block has to raise an error of this kind, and no other."""
        __tracebackhide__ = True
        try:
            yield
        except kind:
            return
        except Exception as error:
            why = f"{type(error).__name__} and no {kind.__name__}: {error}"
            raise ContractError(self.subject, clause, why) from error
        raise ContractError(self.subject, clause, "nothing was raised")


def bits_of(tensor: Tensor) -> bytes:
    """Dtype, shape and bits of the values, so that NaN equals itself and −0 differs from 0."""
    values = materialize(tensor).detach().cpu().contiguous()
    raw = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{values.dtype}{list(values.shape)}".encode() + raw


def bits_of_all(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """`bits_of` by name."""
    return {name: bits_of(tensor) for name, tensor in tensors.items()}


def difference(first: Program, second: Program) -> str:
    """The first difference of two programs: a line of text, or a tensor; empty if there is none."""
    for a, b in zip(str(first).splitlines(), str(second).splitlines(), strict=False):
        if a != b:
            return f"{a!r} became {b!r}"
    if str(first) != str(second):
        return "one has more nodes"
    before, after = bits_of_all(first.tensors()), bits_of_all(second.tensors())
    odd = [name for name in before | after if before.get(name) != after.get(name)]
    return f"the tensor {odd[0]} ({len(odd)} in all)" if odd else ""

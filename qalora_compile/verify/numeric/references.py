"""Runs the reference on every input once, and keeps its values in files for all execution modes."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qalora_compile.ir.program import Program
from qalora_compile.verify.numeric.error_bound import UNITS
from qalora_compile.verify.numeric.run_float64 import Values, run_reference, run_sensitivity
from qalora_compile.verify.numeric.work import Work


@dataclass(frozen=True)
class References:
    """The reference on every input.

    Attributes:
        program: The reference.
        names: The nodes whose values are kept.
        leaves: Flat inputs, in signature order, of each call.
        working: The precision at which the candidate computes.
        folder: Where the values are.
    """

    program: Program
    names: frozenset[str]
    leaves: tuple[Sequence[Any], ...]
    working: torch.dtype
    folder: Path

    def load(self, index: int) -> ReferenceValues:
        """The values on one input."""
        exact, own = (load_file(self.folder / f"{index}.{part}") for part in ("exact", "own"))
        return ReferenceValues(self, index, exact, own)

    def run(self, index: int) -> None:
        """Run the reference on one input and keep its values."""
        exact, own = run_reference(self.program, self.leaves[index], self.names, self.working)
        self._keep(f"{index}.exact", exact)
        self._keep(f"{index}.own", own)

    def sensitivity(self, index: int, exact: Values) -> Values:
        """`run_sensitivity` on one input, which runs on the first call."""
        path = self.folder / f"{index}.sensitivity"
        if not path.exists():
            leaves = self.leaves[index]
            found = run_sensitivity(self.program, leaves, self.names, self.working, exact)
            self._keep(path.name, found)
        return load_file(path)

    def _keep(self, name: str, values: Values) -> None:
        kept = {n: v.contiguous().clone() for n, v in values.items()}
        save_file(kept, self.folder / name)


@dataclass(frozen=True)
class ReferenceValues:
    """The reference on one input: T and max |Aᵢ − T| by node (`check_bound`)."""

    references: References
    index: int
    exact: Values
    own: Values

    @property
    def unit(self) -> float:
        """Unit roundoff of the candidate's precision."""
        return UNITS[self.references.working]

    @cached_property
    def sensitivity(self) -> Values:
        """The largest |Aᵢ − T| where every result is off by `SENSITIVITY` roundings, by node."""
        return self.references.sensitivity(self.index, self.exact)


@contextmanager
def run_references(
    program: Program,
    names: Collection[str],
    leaves: Mapping[str, Sequence[Any]],
    working: torch.dtype,
    work: Work,
) -> Iterator[References]:
    """Run the reference on every input, in float64 and at the candidate's precision.

    Args:
        program: The reference.
        names: The nodes whose values are compared.
        leaves: Flat inputs by the name of the call.
        working: The precision at which the candidate computes.
        work: Progress.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls = tuple(leaves.values())
        references = References(program, frozenset(names), calls, working, Path(folder))
        for index in range(len(calls)):
            references.run(index)
            work.reference_done()
        yield references

"""Differences of outputs, relative to what rounding does to the reference itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.verify.compare import Comparison
from qalora_compile.verify.numeric.error_bound import UNITS, rounding_ratio
from qalora_compile.verify.numeric.run_float64 import output_nodes, run_reference, working_dtype
from qalora_compile.verify.padding import padding_of
from qalora_compile.verify.runners.open_runner import ProgramRunner
from qalora_compile.verify.runners.run import Runner


@dataclass(frozen=True)
class RoundingReference:
    """A reference that can run in float64.

    Attributes:
        program: The reference.
        working: The precision at which the candidate computes.
    """

    program: Program
    working: torch.dtype

    @classmethod
    def of(cls, reference: Runner, candidate: Runner) -> RoundingReference:
        """The reference of two runners.

        Raises:
            UserInputError: the reference is not a program, and only a program runs in float64.
        """
        if not isinstance(reference, ProgramRunner):
            raise UserInputError(
                "the reference is not a program, so the effect of rounding on it is not known",
                where=reference.label,
                hint="give a program as the reference, or a tolerance without rounding=True",
            )
        program = candidate.program if isinstance(candidate, ProgramRunner) else None
        working = torch.float32 if program is None else working_dtype(program)
        return cls(reference.program, working)

    def checked(
        self, rows: Sequence[Comparison], leaves: Sequence[Any], found: Mapping[str, Tensor]
    ) -> list[Comparison]:
        """Comparisons of outputs on one input, with `rounding` filled in."""
        nodes = output_nodes(self.program)
        wanted = {nodes[row.name] for row in rows if row.name in nodes and not row.problem}
        exact, own = run_reference(self.program, leaves, wanted, self.working)
        padding = padding_of(self.program.signature, leaves)
        checked = []
        for row in rows:
            name = nodes.get(row.name, "")
            if name not in exact:
                checked.append(row)
                continue
            padded = None if padding is None else padding.of(exact[name])
            value = found[row.name]
            ratio = rounding_ratio(exact[name], own[name], value, UNITS[self.working], padded)
            checked.append(replace(row, rounding=ratio))
        return checked

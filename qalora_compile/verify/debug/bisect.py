"""`bisect`: the first step of a pipeline that changes what a program computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.progress import announce
from qalora_compile.verify.numeric.compare_nodes import compare_nodes, named_inputs
from qalora_compile.verify.numeric.report import NumericReport, ValueRow, describe


@dataclass(frozen=True)
class Step:
    """One step of a pipeline.

    Attributes:
        name: The transformation, for example a pass as text.
        program: The result.
        lossy: The step is meant to change what is computed (quantization). Later steps are compared
            with its result, and the step itself is not checked.
    """

    name: str
    program: Program
    lossy: bool = False


@dataclass(frozen=True)
class Culprit:
    """The step that breaks equivalence.

    Attributes:
        index: Index of the step.
        step: Its name.
        before: The input program of the step.
        after: Its output program.
        report: The comparison of the two. If rounding explains every single step but not all of
            them together, the comparison of the last lossy step's result with `after`.
        inputs: The inputs of the comparison, by name.
        cumulative: Whether `report` spans several steps.
    """

    index: int
    step: str
    before: Program
    after: Program
    report: NumericReport
    inputs: Mapping[str, Call]
    cumulative: bool = False

    @property
    def row(self) -> ValueRow | None:
        """The first value, in graph order, at which the two diverge; None if they do not run."""
        return None if self.report.culprit is None else self.report.culprit[1]

    @property
    def site(self) -> str:
        """The name of the site at which the two diverge, or of the module; "" outside of all."""
        return "" if self.row is None else self.row.path

    def __str__(self) -> str:
        what = "" if self.row is None else describe(self.row)
        lines = () if self.row is None else self.row.lines
        how = ", with the steps before it" if self.cumulative else ""
        text = [f"step {self.index + 1}, {self.step}, is the first to change the program{how}"]
        return "\n".join(
            [*text, f"  {what or self.report.difference}", *(f"    {n}" for n in lines)]
        )


def bisect(
    start: Program, steps: Sequence[Step], inputs: Mapping[str, Call] | None = None
) -> Culprit | None:
    """Find the first step that changes what is computed.

    Every step is tried in order, because bisection would miss a change that a later step undoes.

    Args:
        start: The input program of the first step.
        steps: The steps, in order.
        inputs: Calls by name; None draws two random calls and all adversarial ones for `start`.

    Returns:
        The culprit, or None if every step preserves the meaning of the last lossy step's result
        (`compare_nodes` says EQUAL; UNDECIDED counts as a change).

    Raises:
        UserInputError: there is no step, or the programs take different inputs.
    """
    if not steps:
        raise UserInputError("there is no step to check", hint="name at least one pass")
    calls = named_inputs(start, 2) if inputs is None else inputs
    base, last = start, start
    for index, step in enumerate(steps):
        announce("bisect", index, len(steps))
        if step.lossy:
            base = step.program
        elif not (report := compare_nodes(base, step.program, calls)).passed:
            alone = report if last is base else compare_nodes(last, step.program, calls)
            if alone.passed:
                return Culprit(index, step.name, base, step.program, report, calls, True)
            return Culprit(index, step.name, last, step.program, alone, calls)
        last = step.program
    announce("bisect", len(steps), len(steps))
    return None

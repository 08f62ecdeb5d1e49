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
        name: What was done, for example a pass as text.
        program: What came out.
        lossy: It is meant to change what is computed (quantization): what follows is held to its
            result, and the step itself is not judged.
    """

    name: str
    program: Program
    lossy: bool = False


@dataclass(frozen=True)
class Culprit:
    """The step that breaks equivalence.

    Attributes:
        index: Of the step.
        step: Its name.
        before: The program that the step was given.
        after: What it made of it.
        report: The comparison of the two, or, where each step alone is within what rounding
            explains and all of them are not, of the last lossy step with `after`.
        inputs: What was compared on, by name.
        cumulative: The latter is the case.
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
        """The first value, in graph order, at which the two part; None if they do not run."""
        return None if self.report.culprit is None else self.report.culprit[1]

    @property
    def site(self) -> str:
        """The site at which it is: its name, or that of the module; "" outside of all."""
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

    Every step is tried, in order: halving would miss what a later step undoes.

    Args:
        start: The program that the first step was given.
        steps: In order.
        inputs: Calls by name; None takes two random and all adversarial ones of `start`.

    Returns:
        The culprit, or None if every step keeps the meaning of what the last lossy step before it
        made (verdict EQUAL of `compare_nodes`: UNDECIDED counts as a change).

    Raises:
        UserInputError: there is no step, or the programs take other inputs.
    """
    if not steps:
        raise UserInputError("there is no step to look at", hint="name at least one pass")
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

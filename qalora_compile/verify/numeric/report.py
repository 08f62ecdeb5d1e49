"""Results of a numeric comparison: one row per value, for each execution mode."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qalora_compile.brief import Brief
from qalora_compile.errors import VerificationError
from qalora_compile.verdict import Verdict
from qalora_compile.verify.compare import BEYOND, EXPLAINED
from qalora_compile.verify.numeric.error_bound import BoundCheck


@dataclass(frozen=True)
class ValueRow:
    """A value that both graphs compute, on the input on which its error is largest.

    Attributes:
        name: `input of <site>`, `<site>`, `output <name>` or `node <name>`.
        kind: `read` by a site, `site`, `output`, or a `node` between them.
        path: Module path in the user's model, where it is known.
        lines: The nodes of both graphs as text; if the graphs' structure differs before this value,
            the nodes at which they diverge.
        input: Name of the input that is worst.
        worst: The check on that input.
        undefined: How many elements, over all inputs, were not compared (`BoundCheck.undefined`).
        verdict: EQUAL, UNDECIDED or DIFFERENT.
    """

    name: str
    kind: str
    path: str
    lines: tuple[str, str]
    input: str
    worst: BoundCheck
    undefined: int
    verdict: Verdict


@dataclass(frozen=True)
class ModeReport:
    """One execution mode of the candidate.

    Attributes:
        name: `as a program`, or optimization level and kernels of an exported model.
        rows: The values in graph order, outputs last.
        inputs: Name of each input on which outputs were compared, and their largest ratio.
        problem: Why it did not run, or "".
        interrupted: Whether the comparison was stopped before this mode was done.
    """

    name: str
    rows: tuple[ValueRow, ...]
    inputs: tuple[tuple[str, float], ...] = ()
    problem: str = ""
    interrupted: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of its rows; DIFFERENT if it did not run."""
        if self.interrupted:
            return Verdict.UNDECIDED
        if self.problem:
            return Verdict.DIFFERENT
        return Verdict.worst(row.verdict for row in self.rows)

    @property
    def first(self) -> ValueRow | None:
        """The first row in graph order that has the mode's verdict; None if that is EQUAL."""
        if self.verdict == Verdict.EQUAL:
            return None
        return next((row for row in self.rows if row.verdict == self.verdict), None)

    @property
    def worst(self) -> ValueRow | None:
        """The row with the largest ratio."""
        return max(self.rows, key=lambda row: row.worst.ratio, default=None)


@dataclass(frozen=True, repr=False)
class NumericReport(Brief):
    """Outcome of `compare_nodes`.

    Attributes:
        reference: What was run in float64, and at its own precision.
        candidate: What was compared with it.
        inputs: Names of the inputs, in the order they were tried.
        modes: One report for each execution mode of the candidate.
        notes: What was not tried, and why.
    """

    reference: str
    candidate: str
    inputs: tuple[str, ...]
    modes: tuple[ModeReport, ...]
    notes: tuple[str, ...] = ()

    def brief(self) -> dict[str, object]:
        """Verdict, what was compared, and the first difference."""
        return {
            "verdict": self.verdict,
            "reference": self.reference,
            "candidate": self.candidate,
            "inputs": len(self.inputs),
            "modes": ", ".join(f"{mode.name} ({mode.verdict})" for mode in self.modes),
            "first difference": self.difference,
        }

    @property
    def verdict(self) -> Verdict:
        """DIFFERENT if any mode is, else UNDECIDED if any is, else EQUAL."""
        return Verdict.worst(mode.verdict for mode in self.modes)

    @property
    def passed(self) -> bool:
        """Whether the verdict is EQUAL: UNDECIDED is not."""
        return self.verdict == Verdict.EQUAL

    @property
    def culprit(self) -> tuple[ModeReport, ValueRow | None] | None:
        """The first mode with that verdict, and its first such row; None if all are EQUAL."""
        if self.passed:
            return None
        mode = next(mode for mode in self.modes if mode.verdict == self.verdict)
        return mode, mode.first

    @property
    def difference(self) -> str | None:
        """The culprit as one line of text, with the nodes below it; None if all are EQUAL."""
        if self.culprit is None:
            return None
        mode, row = self.culprit
        if row is None:
            return f"{mode.name}: {mode.problem}"
        return f"{describe(row)}\n    {row.lines[0]}\n    {row.lines[1]}"

    def check(self) -> NumericReport:
        """Return self, or raise.

        Raises:
            VerificationError: the verdict is DIFFERENT or UNDECIDED.
        """
        if self.culprit is None:
            return self
        mode, row = self.culprit
        raise VerificationError(
            f"{self.candidate} is not the same as {self.reference}: {self.verdict}",
            report=self,
            where=f"{mode.name}: {mode.problem or (row and describe(row))}",
            hint=None
            if self.verdict == Verdict.DIFFERENT
            else "rounding explains a part of it: try more inputs, or prove_equivalence",
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON types; numbers that are not finite become null."""
        return {
            "reference": self.reference,
            "candidate": self.candidate,
            "verdict": self.verdict,
            "explained": EXPLAINED,
            "beyond": BEYOND,
            "inputs": list(self.inputs),
            "difference": self.difference,
            "modes": [_mode_json(mode) for mode in self.modes],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.verdict}: {self.candidate} against {self.reference} in float64 "
            f"({len(self.inputs)} inputs; rounding explains a ratio of {EXPLAINED:g}, "
            f"{BEYOND:g} is beyond it)"
        ]
        for mode in self.modes:
            worst = mode.worst
            found = mode.problem or (
                f"{len(mode.rows)} values, largest ratio {worst.worst.ratio:.3g} at {worst.name}"
                if worst is not None
                else "nothing to compare"
            )
            lines.append(f"  {mode.verdict:9}  {mode.name}: {found}")
        if self.difference:
            lines.append(f"  first: {self.difference}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def describe(row: ValueRow) -> str:
    """A row in one line."""
    found, where = row.worst, "" if row.path in ("", row.name) else f" ({row.path})"
    if found.problem:
        return f"{row.name}{where}: {found.problem}"
    if not found.checked:
        return f"{row.name}{where}: the reference has no accurate value on {row.input}"
    return (
        f"{row.name}{where}: off by {found.error:.3g} of {found.scale:.3g} on {row.input}, "
        f"{found.ratio:.3g} times what rounding does to the reference ({found.own:.3g})"
    )


def _mode_json(mode: ModeReport) -> dict[str, Any]:
    return {
        "name": mode.name,
        "verdict": mode.verdict,
        "problem": mode.problem,
        "inputs": {name: _number(ratio) for name, ratio in mode.inputs},
        "values": [
            {
                "name": row.name,
                "kind": row.kind,
                "path": row.path,
                "lines": list(row.lines),
                "input": row.input,
                "verdict": row.verdict,
                "undefined_in_all": row.undefined,
                **{k: _number(v) for k, v in dataclasses.asdict(row.worst).items()},
            }
            for row in mode.rows
        ],
    }


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

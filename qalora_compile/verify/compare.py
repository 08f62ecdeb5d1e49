"""Comparison of tensors in float64, tolerances, and the report of a verification."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qalora_compile.brief import Brief
from qalora_compile.errors import UserInputError, VerificationError
from qalora_compile.verdict import Verdict


@dataclass(frozen=True)
class Comparison:
    """The difference between a candidate and its reference, over every input tried.

    Attributes:
        name: Name of the output or site.
        max_abs: Largest absolute difference.
        max_rel: Largest absolute difference divided by the largest absolute reference value.
        sqnr_db: Signal to error ratio in decibels, 10 log10(Σ reference² / Σ error²); higher is
            better, infinite if the two are equal.
        scale: Largest absolute reference value.
        problem: What no tolerance admits (different shapes, NaN, unequal integers), or empty.
        rounding: The error against the exact value, as a multiple of what rounding does to the
            reference (`verify.numeric.error_bound`); None if that was not asked for.
    """

    name: str
    max_abs: float
    max_rel: float
    sqnr_db: float
    scale: float
    problem: str = ""
    rounding: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The difference that is admitted. There is no default: the caller states it.

    Attributes:
        max_abs: Largest absolute difference of an output.
        max_rel: Largest absolute difference relative to the output's scale.
        min_sqnr_db: Least signal to error ratio in decibels.
        rounding: Compare the difference with what rounding does to the reference itself, which must
            be a program: up to 8 times as much is always admitted, 64 times or more never is, and
            in between the other figures decide.
    """

    max_abs: float | None = None
    max_rel: float | None = None
    min_sqnr_db: float | None = None
    rounding: bool = False

    def __post_init__(self) -> None:
        values = (self.max_abs, self.max_rel, self.min_sqnr_db)
        if all(v is None for v in values):
            raise UserInputError(
                "the tolerance admits anything", hint="give max_abs, max_rel or min_sqnr_db"
            )
        for value in values:
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserInputError(f"a tolerance is {value!r}", hint="use a number, 0 or more")

    def admits(self, found: Comparison, *, output_scale: float | None = None) -> bool:
        """Whether a comparison is within the tolerance.

        Args:
            found: The comparison.
            output_scale: For a site inside the model, the scale of the model's outputs. It converts
                `max_abs` to the site's own scale if that is larger.
        """
        if found.problem or math.isnan(found.max_abs):
            return False
        if self.rounding and found.rounding is not None:
            verdict = verdict_of(found.rounding)
            if verdict != Verdict.UNDECIDED:
                return verdict == Verdict.EQUAL
        factor = 1.0
        if output_scale:
            factor = max(1.0, found.scale / output_scale)
        return (
            (self.max_abs is None or found.max_abs <= self.max_abs * factor)
            and (self.max_rel is None or found.max_rel <= self.max_rel)
            and (self.min_sqnr_db is None or found.sqnr_db >= self.min_sqnr_db)
        )

    def __str__(self) -> str:
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        rounding = given.pop("rounding")
        text = ", ".join(f"{k} {v:g}" for k, v in given.items())
        return f"{text} or what rounding explains" if rounding else text


def compare(name: str, reference: Tensor, candidate: Tensor) -> Comparison:
    """Compare two tensors in float64.

    NaN values or different shapes are reported as a problem, without numbers. Integers and booleans
    (classes, tokens, masks) must be equal: a difference is a problem as well as a number.
    """
    if reference.shape != candidate.shape:
        text = f"shapes {list(reference.shape)} and {list(candidate.shape)} differ"
        return Comparison(name, math.inf, math.inf, -math.inf, math.nan, text)
    a, b = reference.detach().double(), candidate.detach().double()
    if bool(torch.isnan(a).any() | torch.isnan(b).any()):
        return Comparison(name, math.nan, math.nan, -math.inf, math.nan, "NaN values")
    if a.numel() == 0:
        return Comparison(name, 0.0, 0.0, math.inf, 0.0)
    error = torch.where(a == b, torch.zeros_like(a), (a - b).abs())  # equal infinities agree
    finite = a[torch.isfinite(a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    worst = float(error.max())
    relative = worst / scale if scale else (0.0 if worst == 0 else math.inf)
    noise, signal = float(error.square().sum()), float(finite.square().sum())
    problem = _unequal(reference, candidate)
    return Comparison(name, worst, relative, _decibels(signal, noise), scale, problem)


def _unequal(reference: Tensor, candidate: Tensor) -> str:
    """How many integers or booleans differ. Compared exactly, since float64 rounds large ones."""
    if any(t.is_floating_point() or t.is_complex() for t in (reference, candidate)):
        return ""
    differ = int((reference != candidate).sum())
    return f"{differ} of {reference.numel()} integers differ" if differ else ""


def _decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), with its limits for no noise, no signal and infinite noise."""
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def worst_of(comparisons: Iterable[Comparison]) -> Comparison:
    """The worst of several comparisons of one name, one for each input."""
    items = list(comparisons)
    nans = any(math.isnan(c.max_abs) for c in items)
    return Comparison(
        items[0].name,
        math.nan if nans else max(c.max_abs for c in items),
        math.nan if nans else max(c.max_rel for c in items),
        min(c.sqnr_db for c in items),
        max((c.scale for c in items if not math.isnan(c.scale)), default=math.nan),
        next((c.problem for c in items if c.problem), ""),
        max((c.rounding for c in items if c.rounding is not None), default=None),
    )


@dataclass(frozen=True, repr=False)
class Report(Brief):
    """Outcome of `verify_equivalence`.

    Attributes:
        reference, candidate: What was compared.
        tolerance: The difference that was admitted.
        inputs: How many inputs were tried.
        outputs: One comparison for each output of the model; these decide the verdict.
        sites: One comparison for each site that both graphs expose, in graph order.
        first_divergence: The first site out of tolerance if the verdict is DIFFERENT; if every site
            agrees, `after the last site`.
        verdict: EQUAL (within the tolerance) or DIFFERENT.
        by_input: One comparison for each input, over all outputs, by its place (`input 0`).
    """

    reference: str
    candidate: str
    tolerance: Tolerance
    inputs: int
    outputs: tuple[Comparison, ...]
    sites: tuple[Comparison, ...]
    first_divergence: str | None
    verdict: Verdict
    by_input: tuple[Comparison, ...] = ()

    def brief(self) -> dict[str, object]:
        """Verdict, what was compared, and the largest difference."""
        return {
            "verdict": self.verdict,
            "reference": self.reference,
            "candidate": self.candidate,
            "inputs": self.inputs,
            "tolerance": self.tolerance,
            "largest difference": f"{self.max_abs:.3g}" if self.outputs else "",
            "first diverging site": self.first_divergence,
        }

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance."""
        return self.verdict == Verdict.EQUAL

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of any output."""
        return worst_of(self.outputs).max_abs

    def check(self) -> Report:
        """Return self, or raise.

        Raises:
            VerificationError: the verdict is DIFFERENT.
        """
        if not self.passed:
            raise VerificationError(
                f"{self.candidate} differs from {self.reference} by {self.max_abs:.3g}, "
                f"more than {self.tolerance}",
                report=self,
                where=f"first diverging site: {self.first_divergence}",
            )
        return self

    def summary(self) -> dict[str, Any]:
        """What was compared, the verdict and its numbers, as JSON types."""
        return {
            "reference": self.reference,
            "candidate": self.candidate,
            "inputs": self.inputs,
            "tolerance": dataclasses.asdict(self.tolerance),
            "outputs": [_row(c) for c in self.outputs],
            "verdict": self.verdict,
        }

    def to_json(self) -> dict[str, Any]:
        """As JSON types; infinities and NaN become null."""
        return self.summary() | {
            "sites": [_row(c) for c in self.sites],
            "first_divergence": self.first_divergence,
            "by_input": [_row(c) for c in self.by_input],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.verdict}: {self.candidate} against {self.reference} "
            f"({self.inputs} inputs, tolerance {self.tolerance})"
        ]
        rows = [*self.sites, *self.outputs]
        width = max(len(c.name) for c in rows)
        lines.append(f"  {'':{width}}  {'max abs':>10} {'max rel':>10} {'sqnr dB':>8}")
        lines += [
            f"  {c.name:{width}}  {c.max_abs:10.3g} {c.max_rel:10.3g} {c.sqnr_db:8.1f}"
            + (f"  {c.problem}" if c.problem else "")
            for c in rows
        ]
        if self.first_divergence:
            lines.append(f"  first diverging site: {self.first_divergence}")
        return "\n".join(lines)


def _row(comparison: Comparison) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in dataclasses.asdict(comparison).items()
    }


EXPLAINED = 8.0
"""Up to this ratio rounding explains an error: the same sums, taken in another order, round
otherwise. What is seen between right exports and programs stays below it: docs/how-to/verify.md."""


BEYOND = 64.0
"""From this ratio on rounding is no explanation. A mistake is orders of magnitude larger: float16
somewhere is 8192 roundings of float32."""


def verdict_of(ratio: float) -> Verdict:
    """EQUAL up to `EXPLAINED`, DIFFERENT from `BEYOND` on, UNDECIDED between."""
    if ratio <= EXPLAINED:
        return Verdict.EQUAL
    return Verdict.UNDECIDED if ratio < BEYOND else Verdict.DIFFERENT

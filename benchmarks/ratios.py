"""Medians, quartiles, and ratios within rounds: what every benchmark prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a series; quartiles are measured values, the ends of few."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Spread(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Each round's value by the same round's base."""
    return spread([value / other for value, other in zip(values, base, strict=True)])

"""The common verdicts of all checks, on inputs, along a graph or by proof."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Protocol


class Verdict(str, Enum):
    """The result of checking that two things compute the same, from best to worst.

    A proof says PROVED, PROVED UNDER, SAMPLED, UNDECIDED or DIFFERENT; checks that run both things
    say EQUAL, UNDECIDED or DIFFERENT.

    Attributes:
        PROVED: They are equal for every input.
        PROVED_UNDER: They are equal for every input that meets the listed conditions.
        EQUAL: They agree on the inputs tried, within the stated tolerance or rounding errors.
        SAMPLED: A proof left parts open, which agree on the samples tried. Not a pass.
        UNDECIDED: Neither was shown: rounding explains only a part of the difference, or something
            could be neither proved nor tried.
        DIFFERENT: They differ, or could not both be run.
    """

    PROVED = "PROVED"
    PROVED_UNDER = "PROVED UNDER"
    EQUAL = "EQUAL"
    SAMPLED = "SAMPLED"
    UNDECIDED = "UNDECIDED"
    DIFFERENT = "DIFFERENT"

    def __str__(self) -> str:
        return self.value

    def __format__(self, form: str) -> str:  # Python 3.10 and 3.12 would do different things
        return format(self.value, form)

    def is_worse_than(self, other: Verdict) -> bool:
        """Whether this is further from equality than `other`."""
        return _ORDER.index(self) > _ORDER.index(other)

    @classmethod
    def of(cls, equal: bool) -> Verdict:
        """EQUAL or DIFFERENT."""
        return cls.EQUAL if equal else cls.DIFFERENT

    @classmethod
    def worst(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """The worst of some verdicts; DIFFERENT if there are none, as nothing was compared."""
        return max(verdicts, key=_ORDER.index, default=cls.DIFFERENT)


_ORDER = tuple(Verdict)
PROVEN = (Verdict.PROVED, Verdict.PROVED_UNDER)
"""The verdicts of a proof that hold for all inputs."""


class Finding(Protocol):
    """The outcome of a check: a report, a numeric report or a certificate of `verify`."""

    @property
    def verdict(self) -> Verdict:
        """The verdict."""

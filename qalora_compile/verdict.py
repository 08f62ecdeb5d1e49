"""The common verdicts of all checks, on inputs, along a graph or by proof."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Protocol


class Verdict(str, Enum):
    """The result of checking that two things compute the same, from best to worst.

    Attributes:
        EQUAL: They agree within the stated tolerance, within rounding errors, or by proof.
        UNDECIDED: Neither was shown: rounding explains only a part of the difference, or something
            could be neither proved nor tried.
        DIFFERENT: They differ, or could not both be run.
    """

    EQUAL = "EQUAL"
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


class Finding(Protocol):
    """The outcome of a check: a report, a numeric report or a certificate of `verify`."""

    @property
    def verdict(self) -> Verdict:
        """The verdict."""

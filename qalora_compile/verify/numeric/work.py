"""The work of a comparison: one progress bar over all of it, and what is kept after Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable

from qalora_compile.progress import announce
from qalora_compile.verify.numeric.report import ModeReport

_HEADING = "compare"
_OF_REFERENCE = 3
"""A run of the reference takes as long as that many of the candidate: it is in float64, and at the
candidate's precision once more."""


class Work:
    """The progress of all runs, and whether Ctrl-C has ended them.

    Args:
        inputs: Number of inputs, on each of which the reference runs.
        runs: Number of runs of the candidate, over all execution modes.
    """

    def __init__(self, inputs: int, runs: int) -> None:
        self._done, self._total = 0, _OF_REFERENCE * inputs + runs
        self._modes, self._stopped = 0, False
        announce(_HEADING, 0, self._total)

    def reference_done(self) -> None:
        """Note that the reference has run on an input."""
        self._add(_OF_REFERENCE)

    def run_done(self) -> None:
        """Note that the candidate has run on an input."""
        self._add(1)

    def _add(self, units: int) -> None:
        self._done += units
        announce(_HEADING, self._done, self._total)

    def guard(self, name: str, attempt: Callable[[], ModeReport]) -> ModeReport:
        """Run a mode; after Ctrl-C, this and all later ones are undecided.

        Raises:
            KeyboardInterrupt: no mode is done yet.
        """
        try:
            if not self._stopped:
                found = attempt()
                self._modes += 1
                return found
        except KeyboardInterrupt:
            if not self._modes:
                raise
            self._stopped = True
        return ModeReport(name, (), (), "interrupted before it was done", interrupted=True)

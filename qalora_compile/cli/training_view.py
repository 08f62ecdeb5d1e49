"""Progress of a training run on the terminal."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from qalora_compile.cli.ui import Steps

if TYPE_CHECKING:
    from qalora_compile.training.fit import StepReport

_RECENT = 10
"""Number of steps over which tokens per second are averaged."""


class View:
    """The progress line of a training run.

    Args:
        shown: Shows the line.
    """

    def __init__(self, shown: Steps) -> None:
        self._shown = shown
        self._recent: deque[StepReport] = deque(maxlen=_RECENT)
        self._held_out = ""

    def show(self, report: StepReport) -> None:
        """Show a step."""
        self._recent.append(report)
        if report.held_out is not None:
            self._held_out = f", held out {report.held_out:.4f}"
            if report.held_out_accuracy is not None:
                self._held_out += f" ({report.held_out_accuracy:.1%} right)"
        rate = sum(r.tokens for r in self._recent) / sum(r.seconds for r in self._recent)
        note = f"loss {report.loss:.4f}{self._held_out}"
        note += f", lr {report.learning_rate:.2e}, {rate:.0f} {report.unit}/s"
        self._shown.update("train", report.step, None, note)

"""The line of a training on a terminal, and where there is none."""

from __future__ import annotations

import io

from rich.console import Console

from qalora_compile.cli.training_view import View
from qalora_compile.cli.ui import Steps
from qalora_compile.training import StepReport


def shown(*, terminal: bool, begun: int = 0) -> str:
    """Ten steps, two of them with a held-out loss."""
    file = io.StringIO()
    steps = Steps(Console(file=file, force_terminal=terminal, width=160))
    view = View(steps)
    with steps._bar if terminal else io.StringIO():
        steps.update("train", begun, begun + 10)
        for step in range(begun + 1, begun + 11):
            held_out = {begun + 4: 3.5, begun + 8: 3.25}.get(step)
            view.show(StepReport(step, 2.5, 1e-3, 0.5, 100, 0.5, held_out))
    return file.getvalue()


def test_a_terminal_shows_losses_rate_speed_and_the_time_left() -> None:
    text = shown(terminal=True)
    for part in ("10/10", "loss 2.5000", "held out 3.2500", "lr 1.00e-03", "200 tokens/s", "eta"):
        assert part in text


def test_plain_lines_show_them_too() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[-1].startswith("train 10/10")
    assert "eta 0 s loss 2.5000, held out 3.2500, lr 1.00e-03, 200 tokens/s" in lines[-1]


def test_a_resumed_training_counts_on() -> None:
    assert shown(terminal=False, begun=30).splitlines()[-1].startswith("train 40/40")

"""The training of `finetune`: checkpoints, signals, what is logged and what the terminal shows."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qalora_compile.cli.finetune_job import FAILED, TRAINING, Job
from qalora_compile.cli.signals import stopping
from qalora_compile.cli.ui import Steps
from qalora_compile.errors import UserInputError
from qalora_compile.training.distributed import Processes
from qalora_compile.training.fit import FitResult, FitState, StepReport, fit
from qalora_compile.training.records.log import (
    LOG_FILE,
    TENSORBOARD,
    JsonLog,
    Recorder,
    TensorBoardLog,
)

_RECENT = 10
"""Steps over which the rate of tokens is averaged."""


def train(
    job: Job, options: argparse.Namespace, shown: Steps, processes: Processes
) -> tuple[FitResult, int]:
    """Train, and save every `--save-every` steps, at the end and when a signal stops it.

    Returns:
        The result, and the exit code that it calls for.

    Raises:
        UserInputError: a loss is not finite. The adapters on disk are those of the last
            checkpoint, whose own loss was.
    """
    view = View(shown, job.spec.steps)
    view.begin(job.state.step)
    with stopping() as stop, _recorders(job, options, processes) as recorders:

        def on_step(report: StepReport, state: FitState) -> bool:
            for recorder in recorders:
                recorder.record(report)
            view.show(report)
            return stop.number is not None and not state.is_over(job.spec)

        def on_good(state: FitState, last: bool) -> None:
            if processes.is_first and (last or state.step % options.save_every == 0):
                job.save(options.keep)

        if processes.is_first:
            job.record.pop("problem", None)
            job.note(status=TRAINING)
        result = fit(
            job.trained,
            job.batches,
            job.spec,
            state=job.state,
            held_out=job.held_out.examples if job.held_out else (),
            on_step=on_step,
            on_good=on_good,
            processes=processes,
        )
    return result, stop.exit_code if result.stopped else 0


@contextmanager
def noting_failure(job: Job, processes: Processes) -> Iterator[None]:
    """Write into `run.json` what goes wrong in the block."""
    try:
        yield
    except UserInputError as error:
        if processes.is_first:
            job.note(status=FAILED, problem=error.what)
        raise


class View:
    """The line of a training on the terminal.

    Args:
        shown: Where it is shown.
        steps: Of the whole training.
    """

    def __init__(self, shown: Steps, steps: int) -> None:
        self._shown, self._steps = shown, steps
        self._recent: deque[StepReport] = deque(maxlen=_RECENT)
        self._held_out = ""

    def begin(self, step: int) -> None:
        """Show where training begins."""
        self._shown.begin("train", step, self._steps)

    def show(self, report: StepReport) -> None:
        """Show a step."""
        self._recent.append(report)
        if report.held_out is not None:
            self._held_out = f", held out {report.held_out:.4f}"
            if report.held_out_accuracy is not None:
                self._held_out += f" ({report.held_out_accuracy:.1%} right)"
        rate = sum(r.tokens for r in self._recent) / sum(r.seconds for r in self._recent)
        note = f"loss {report.loss:.4f}{self._held_out}"
        note += f", lr {report.learning_rate:.2e}, {rate:.0f} tokens/s"
        self._shown.update("train", report.step, self._steps, note)


@contextmanager
def _recorders(
    job: Job, options: argparse.Namespace, processes: Processes
) -> Iterator[list[Recorder]]:
    """What records the steps: the first process does."""
    recorders: list[Recorder] = []
    try:
        if processes.is_first:
            recorders.append(JsonLog(job.folder / LOG_FILE, job.state.step))
            if TENSORBOARD in options.report_to:
                recorders.append(TensorBoardLog(job.folder / TENSORBOARD, job.state.step))
        yield recorders
    finally:
        for recorder in recorders:
            recorder.close()

"""Logs of training steps in experiment trackers: Weights & Biases, MLflow and Trackio.

Each library is used through the few functions that log a run. The callbacks of transformers need a
Trainer with its arguments, and would log those instead of the options of `finetune`. Where a
library sends the run (project, server, offline) is set by its own environment variables.

A run that is resumed goes on in the same run of the tracker, whose identifier is in the RUN folder.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qalora_compile.config.choices import MLFLOW, TENSORBOARD, TRACKIO, WANDB
from qalora_compile.errors import UserInputError
from qalora_compile.files import write_json
from qalora_compile.optional import require
from qalora_compile.progress import say
from qalora_compile.training.fit import StepReport
from qalora_compile.training.records.log import LOG_FILE, Recorder, TensorBoardLog, figures
from qalora_compile.untrusted import read_object

TRACKED_FILE = "tracked.json"
"""Tracker → identifier of the run there."""
PROJECT = "qalora-compile"
"""The project in which runs are logged if the environment names none."""

Log = Callable[[Mapping[str, float], int], None]
"""Logs the figures of a step."""


class Tracker:
    """A run in one of the trackers.

    Args:
        name: Name of the tracker.
        run: Identifier of the run there.
        log: Logs the figures of a step.
        finish: Ends the run.
    """

    def __init__(self, name: str, run: str, log: Log, finish: Callable[[], object]) -> None:
        self.name, self.run = name, run
        self._log, self._finish = log, finish
        self._failed = False

    def record(self, report: StepReport) -> None:
        """Log a step; after a failure, the training goes on without this log."""
        if self._failed:
            return
        try:
            self._log(figures(report), report.step)
        except Exception as error:  # of a server or network; the libraries raise many types
            self._failed = True
            say(
                f"note: {self.name} takes no more steps, from step {report.step} on "
                f"({_line(error)}); {LOG_FILE} has all of them"
            )

    def close(self) -> None:
        """End the run."""
        with suppress(Exception):  # what was recorded is in the log file, too
            self._finish()


def check_reporting(names: Sequence[str]) -> None:
    """Check that the libraries for `--report-to` are installed.

    Raises:
        UnsupportedError: one of them is not.
    """
    for name in names:
        extra = "train" if name == TENSORBOARD else None
        require(name, extra=extra, purpose=f"report to {name}")


def open_recorders(
    names: Sequence[str], folder: Path, step: int, options: Mapping[str, Any]
) -> Iterator[Recorder]:
    """Open the logs that `--report-to` names, one by one.

    Args:
        names: Of `config.choices.REPORT_TO`.
        folder: The RUN folder.
        step: Number of steps already done; from 1 on, runs of trackers are continued.
        options: The options of the training, which become the settings of the run.

    Raises:
        UnsupportedError: a library is not installed.
        UserInputError: a tracker does not take the run.
    """
    check_reporting(names)
    path = folder / TRACKED_FILE
    known = read_object(path) if step and path.is_file() else {}
    for name in names:
        if name == TENSORBOARD:
            yield TensorBoardLog(folder / TENSORBOARD, step)
            continue
        try:
            tracker = _OPEN[name](folder, known.get(name), options)
        except Exception as error:  # of a server, network or login; the libraries raise many types
            raise UserInputError(
                f"{name} does not take the run: {_line(error)}",
                where=f"--report-to {name}",
                hint=f"leave {name} out, or set its environment variables: "
                "see docs/how-to/training.md",
            ) from error
        known[name] = tracker.run
        write_json(path, known)
        yield tracker


def _wandb(folder: Path, known: str | None, options: Mapping[str, Any]) -> Tracker:
    """A run of Weights & Biases; the environment may hold WANDB_PROJECT, WANDB_MODE and others."""
    wandb = require(WANDB, extra=None, purpose=f"report to {WANDB}")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=known or uuid.uuid4().hex[:12],
        resume="allow",
        dir=str(folder),
        config=dict(options),
        settings={"console": "off"},  # the terminal shows a progress bar
    )
    return Tracker(
        WANDB, str(run.id), lambda values, step: run.log(dict(values), step=step), run.finish
    )


def _mlflow(folder: Path, known: str | None, options: Mapping[str, Any]) -> Tracker:
    """A run of MLflow; the environment may hold MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""
    mlflow = require(MLFLOW, extra=None, purpose=f"report to {MLFLOW}")
    if known:
        run = mlflow.start_run(run_id=known)
    else:
        run = mlflow.start_run(run_name=folder.name)
        mlflow.log_params({name: str(value) for name, value in options.items()})
    return Tracker(
        MLFLOW,
        str(run.info.run_id),
        lambda values, step: mlflow.log_metrics(dict(values), step=step),
        mlflow.end_run,
    )


def _trackio(folder: Path, known: str | None, options: Mapping[str, Any]) -> Tracker:
    """A run of Trackio; the environment may hold TRACKIO_PROJECT and TRACKIO_SPACE_ID.

    Runs are identified by their names.
    """
    trackio = require(TRACKIO, extra=None, purpose=f"report to {TRACKIO}")
    name = known or f"{folder.name}-{uuid.uuid4().hex[:6]}"
    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=name,
        resume="allow",
        config=dict(options),
    )
    return Tracker(
        TRACKIO, name, lambda values, step: trackio.log(dict(values), step=step), trackio.finish
    )


_OPEN: Mapping[str, Callable[[Path, str | None, Mapping[str, Any]], Tracker]] = {
    WANDB: _wandb,
    MLFLOW: _mlflow,
    TRACKIO: _trackio,
}


def _line(error: Exception) -> str:
    """The first line of a message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]

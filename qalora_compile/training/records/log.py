"""Logs of training steps in the RUN folder: JSON lines and, on request, TensorBoard."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from qalora_compile.config.choices import TENSORBOARD
from qalora_compile.errors import UserInputError
from qalora_compile.files import reporting_faults, write_text
from qalora_compile.optional import require
from qalora_compile.training.fit import StepReport

LOG_FILE = "log.jsonl"


class Recorder(Protocol):
    """Records the reports of steps, in order."""

    def record(self, report: StepReport) -> None:
        """Record one step."""

    def close(self) -> None:
        """End the log."""


class JsonLog:
    """`log.jsonl`: one line per step, written as soon as the step is done.

    Args:
        path: The file; it is continued.
        step: Number of steps already done. Lines of later steps, which a killed process may have
            written after its last checkpoint, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows = [row for row in read_log(path) if row["step"] <= step] if path.exists() else []
        write_text(path, "".join(map(_line, rows)))
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def record(self, report: StepReport) -> None:
        """Append a line.

        Raises:
            OutputError: the disk is full.
        """
        row = vars(report) | {"tokens_per_second": round(report.tokens / report.seconds, 1)}
        with reporting_faults(self._path):
            kept = {k: v for k, v in row.items() if v is not None and k != "unit"}
            self._file.write(_line(kept))
            self._file.flush()

    def close(self) -> None:
        """Close the file; an incomplete line that did not fit on the disk is left as it is."""
        with suppress(OSError):
            self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without an unfinished last line of a killed process.

    Raises:
        UserInputError: a line before the last is not a step.
    """
    lines = path.read_text("utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # text after the last "\n" is unfinished
        try:
            row = json.loads(line)
            valid = isinstance(row["step"], int) and math.isfinite(row["loss"])
        except (json.JSONDecodeError, TypeError, KeyError):
            valid = False
        if not valid:
            raise UserInputError("the line is not a training step", where=f"{path}:{number}")
        rows.append(row)
    return rows


class TensorBoardLog:
    """Event files for TensorBoard, in the folder `tensorboard`.

    Args:
        folder: The folder to write to.
        step: Number of steps already done; TensorBoard hides later steps of an earlier run.

    Raises:
        UnsupportedError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        require(TENSORBOARD, extra="train", purpose="write event files")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def record(self, report: StepReport) -> None:
        """Add the values of a step."""
        for name, value in figures(report).items():
            self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def figures(report: StepReport) -> dict[str, float]:
    """The figures of a step by the names that they have in other logs; those that there are."""
    values = {
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/grad_norm": report.grad_norm,
        "train/tokens_per_second": report.tokens / report.seconds,
        "held_out/loss": report.held_out,
        "held_out/accuracy": report.held_out_accuracy,
    }
    return {name: value for name, value in values.items() if value is not None}

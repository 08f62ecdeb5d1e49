"""The log of a training: a line a step, whatever happened in between."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training import StepReport
from qalora_compile.training.records.log import JsonLog, TensorBoardLog, read_log


def report(step: int, held_out: float | None = None) -> StepReport:
    accuracy = None if held_out is None else 0.5
    return StepReport(step, 2.0 / step, 1e-3, 0.5, 90, 0.25, held_out, accuracy)


def write(path: Path, steps: range, done: int) -> None:
    log = JsonLog(path, done)
    for step in steps:
        log.record(report(step, 1.5 if step % 2 == 0 else None))
    log.close()


def test_a_line_holds_what_was_reported(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 3), 0)
    first, second = map(json.loads, path.read_text("utf-8").splitlines())
    assert first == {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 90,
        "seconds": 0.25,
        "tokens_per_second": 360.0,
    }
    assert (second["held_out"], second["held_out_accuracy"]) == (1.5, 0.5)


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_lines_behind_the_checkpoint_are_dropped(tmp_path: Path, torn: int) -> None:
    """A process that was killed has logged steps 4 and 5, the last perhaps in part."""
    path, at_once = tmp_path / "log.jsonl", tmp_path / "at_once.jsonl"
    write(path, range(1, 6), 0)
    text = path.read_text("utf-8")
    path.write_text(text[: len(text) - torn], "utf-8")
    write(path, range(4, 8), 3)
    write(at_once, range(1, 8), 0)
    assert path.read_text("utf-8") == at_once.read_text("utf-8")


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for line in ("no json", '{"loss": 1.0}', '{"step": 2, "loss": null}', "[1]"):
        path.write_text(f"{line}\n", "utf-8")
        with pytest.raises(UserInputError, match="not a training step"):
            read_log(path)


def test_tensorboard_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UnsupportedError, match="tensorboard is needed to write event files"):
        TensorBoardLog(tmp_path / "events", 0)
    assert not list(tmp_path.iterdir())

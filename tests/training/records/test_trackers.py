"""Logs in experiment trackers: stand-ins for their libraries record what is called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.progress import listening
from qalora_compile.training import StepReport
from qalora_compile.training.records.trackers import (
    TRACKED_FILE,
    check_reporting,
    open_recorders,
)

TRACKERS = ("wandb", "mlflow", "trackio")
OPTIONS = {"lr": 1e-3, "steps": 4}


class Library(SimpleNamespace):
    """A stand-in of one of the libraries: `calls` holds the names, arguments and options."""

    def __init__(self, *failing: str) -> None:
        super().__init__(calls=[])
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if name in self.failing:
                raise ConnectionError("no server\nat all")
            run_id = kwargs.get("id") or kwargs.get("run_id") or "of the server"
            info = SimpleNamespace(run_id=run_id)
            return SimpleNamespace(id=run_id, info=info, log=self.log, finish=self.finish)

        if name.startswith("__"):
            raise AttributeError(name)
        return call

    def called(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments and options of the calls of a function."""
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def report(step: int, held_out: float | None = None) -> StepReport:
    accuracy = None if held_out is None else 0.5
    return StepReport(step, 2.0 / step, 1e-3, 0.5, 90, 0.25, held_out, accuracy)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Library]:
    found = {name: Library() for name in TRACKERS}
    for name, library in found.items():
        monkeypatch.setitem(sys.modules, name, library)
    return found


def log_steps(folder: Path, steps: range, done: int, names: tuple[str, ...] = TRACKERS) -> None:
    recorders = list(open_recorders(names, folder, done, OPTIONS))
    for step in steps:
        for recorder in recorders:
            recorder.record(report(step, 1.5 if step == 2 else None))
    for recorder in recorders:
        recorder.close()


def test_each_library_gets_every_step(tmp_path: Path, libraries: dict[str, Library]) -> None:
    log_steps(tmp_path, range(1, 3), 0)
    first = {
        "train/loss": 2.0,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 0.5,
        "train/tokens_per_second": 360.0,
    }
    second = first | {"train/loss": 1.0, "held_out/loss": 1.5, "held_out/accuracy": 0.5}
    expected = [((first,), {"step": 1}), ((second,), {"step": 2})]
    for name, log, end in (
        ("wandb", "log", "finish"),
        ("mlflow", "log_metrics", "end_run"),
        ("trackio", "log", "finish"),
    ):
        assert libraries[name].called(log) == expected, name
        assert libraries[name].calls[-1][0] == end, name


def test_a_run_begins_with_its_options(
    tmp_path: Path, libraries: dict[str, Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    log_steps(tmp_path, range(0), 0)
    ((_, begun),) = libraries["wandb"].called("init")
    assert (begun["project"], begun["name"], begun["config"]) == ("mine", tmp_path.name, OPTIONS)
    ((_, begun),) = libraries["trackio"].called("init")
    assert (begun["project"], begun["config"]) == ("qalora-compile", OPTIONS)
    ((parameters,), _) = libraries["mlflow"].called("log_params")[0]
    assert parameters == {"lr": "0.001", "steps": "4"}


def test_a_resumed_run_goes_on_in_the_same_run(
    tmp_path: Path, libraries: dict[str, Library]
) -> None:
    log_steps(tmp_path, range(1, 3), 0)
    known = json.loads((tmp_path / TRACKED_FILE).read_text("utf-8"))
    assert sorted(known) == sorted(TRACKERS)
    log_steps(tmp_path, range(3, 5), 2)
    again = json.loads((tmp_path / TRACKED_FILE).read_text("utf-8"))
    assert again == known
    first, second = (kwargs for _, kwargs in libraries["wandb"].called("init"))
    assert first["id"] == second["id"]
    first, second = (kwargs for _, kwargs in libraries["trackio"].called("init"))
    assert first["name"] == second["name"]
    first, second = (kwargs for _, kwargs in libraries["mlflow"].called("start_run"))
    assert (first, second) == ({"run_name": tmp_path.name}, {"run_id": known["mlflow"]})
    assert len(libraries["mlflow"].called("log_params")) == 1


def test_a_run_from_the_first_step_is_a_new_one(
    tmp_path: Path, libraries: dict[str, Library]
) -> None:
    log_steps(tmp_path, range(0), 0, ("wandb",))
    log_steps(tmp_path, range(0), 0, ("wandb",))
    first, second = (kwargs for _, kwargs in libraries["wandb"].called("init"))
    assert first["id"] != second["id"]


def test_training_goes_on_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, "mlflow", library)
    said: list[str] = []
    with listening(lambda *_: None, said.append):
        log_steps(tmp_path, range(1, 4), 0, ("mlflow",))
    assert len(library.called("log_metrics")) == 1
    (note,) = said
    assert "mlflow takes no more steps, from step 1 on (ConnectionError: no server)" in note


def test_a_run_that_cannot_begin_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Library("init"))
    with pytest.raises(UserInputError, match="wandb does not take the run: ConnectionError"):
        list(open_recorders(["wandb"], tmp_path, 0, OPTIONS))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_named_with_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_reporting([])
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=f"{name} is needed to report to {name}") as caught:
        check_reporting([name])
    assert caught.value.hint == f"pip install {name}"

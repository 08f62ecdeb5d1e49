"""The benchmarks of training: cells that are there are not run again, and what the tables say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import accuracy, training

LINES = [
    {"method": "qa-lora", "quantizer": "gptq", "bits": 3, "accuracy": value, "loss": value / 2}
    for value in (0.80, 0.82, 0.84)
] + [{"method": "float", "quantizer": "", "bits": 0, "accuracy": 0.9, "loss": 0.25}]


@pytest.mark.parametrize("name", ["training", "accuracy"])
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        benchmark.main(["--help"])
    assert f"python -m benchmarks.{name} --" in capsys.readouterr().out.split("examples:")[1]


def test_a_table_gives_mean_and_spread() -> None:
    head, _, first, second = accuracy.table(LINES).splitlines()
    assert head == "|  | 3 bits | seeds |"
    assert first == "| float | 90.0 %, 0.250 | 1 |"
    assert second == "| qa-lora gptq | 82.0 ± 2.0 %, 0.410 ± 0.010 | 3 |"


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted:
        ran: ClassVar[list[accuracy.Cell]] = []

        def __init__(self, options: Any) -> None:
            pass

        def run(self, cell: accuracy.Cell) -> dict[str, float]:
            self.ran.append(cell)
            return {"accuracy": 0.5, "loss": 1.0}

    monkeypatch.setattr(accuracy, "Bench", Counted)
    file = tmp_path / "cells.jsonl"
    command = ["--cells", str(file), "--seeds", "0", "--bits", "3"]
    accuracy.main([*command, "--methods", "ptq"])
    accuracy.main([*command, "--methods", "ptq", "scale"])
    assert [(c.method, c.quantizer) for c in Counted.ran] == [
        ("ptq", "minmax"),
        ("ptq", "gptq"),
        ("scale", "minmax"),
    ]
    assert len(file.read_text("utf-8").splitlines()) == 3
    accuracy.main([*command, "--methods", "ptq", "--steps", "7"])
    assert len(Counted.ran) == 5, "other settings are other cells"
    accuracy.main([*command, "--methods", "ptq", "--model", "smollm2"])
    assert len(Counted.ran) == 7, "so is another model"
    accuracy.main([*command, "--methods", "ptq", "scale", "--table"])
    assert len(Counted.ran) == 7, "a table runs nothing"


def test_the_training_benchmark_misses_and_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Idle:
        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> Idle:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    (tmp_path / "tokens.safetensors").touch()
    monkeypatch.setattr(training, "worker", Idle)
    for ratio, memory, reached in ((1.1, 0.4, True), (1.2, 0.4, False), (0.9, 0.6, False)):
        row = training.Row("program", 1.0, ratio, ratio, ratio, 1, 1, memory)
        monkeypatch.setattr(training, "measure", lambda *_, row=row: row)
        command = ["--folder", str(tmp_path), "--forms", "program", "--json"]
        command.append(str(tmp_path / "out.json"))
        if reached:
            training.main(command)
        else:
            with pytest.raises(SystemExit, match="1"):
                training.main(command)
        assert ("no form" in capsys.readouterr().out) != reached
        assert json.loads((tmp_path / "out.json").read_text("utf-8"))[0]["ratio"] == ratio

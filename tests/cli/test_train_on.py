"""`finetune`: epochs, going on with `--resume` alone, more steps, and new runs from old ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.cli.finetune import finetune_spec
from qalora_compile.cli.main import main
from qalora_compile.cli.parser import build_parser
from qalora_compile.cli.signals import Stop
from qalora_compile.cli.training_view import View
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.training import StepReport
from qalora_compile.training.records.log import read_log

Capture = pytest.CaptureFixture[str]
OPTIONS = ("--lr", "1e-2", "--rank", "2", "--batch-size", "4", "--save-every", "2")
CONSTANT = ("--schedule", "constant", "--warmup", "0")


@pytest.fixture(scope="module")
def command(model_folder: Path, data_file: Path) -> list[str]:
    return ["finetune", str(model_folder), "--data", str(data_file), *OPTIONS]


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps at a constant rate."""
    out = tmp_path_factory.mktemp("constant") / "run"
    assert main([*command, *CONSTANT, "--steps", "4", "--out", str(out)]) == 0
    return out


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "adapters.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = adapters(a), adapters(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_epochs_are_steps_over_all_examples(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*command, "--epochs", "1.5", "--accumulate", "2", "--out", str(out)]
    assert main(words) == 0
    found = record(out)
    batches = found["examples"] // 4
    steps = -(-3 * batches // 4)
    assert found["fit"]["steps"] == len(read_log(out / "log.jsonl")) == steps
    assert (found["options"]["epochs"], "steps" in found["options"]) == (1.5, False)


@pytest.mark.parametrize("epochs", ["0", "-1", "nan", "inf"])
def test_epochs_out_of_range_are_refused(
    command: list[str], epochs: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main([*command, "--epochs", epochs, "--out", str(tmp_path / "run")]) == 2
    assert "--epochs is" in capsys.readouterr().err


def test_a_finished_run_says_so_at_once(
    finished: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("nothing has to be loaded")

    monkeypatch.setattr("qalora_compile.api.finetune_start.Program.load", load)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert main(["finetune", "--resume", "--out", str(finished)]) == 0
    assert "already finished" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.slow
def test_more_steps_at_a_constant_rate_are_those_of_one_run(
    finished: Path, command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    longer, once = tmp_path / "longer", tmp_path / "once"
    shutil.copytree(finished, longer)
    assert main(["finetune", "--resume", "--out", str(longer), "--steps", "6"]) == 0
    assert "goes on after step 4 of 6" in capsys.readouterr().err
    assert main([*command, *CONSTANT, "--steps", "6", "--out", str(once)]) == 0
    assert same(longer, once)
    assert not same(longer, finished)
    assert record(longer)["fit"]["steps"] == record(longer)["step"] == 6
    assert main(["finetune", "--resume", "--out", str(longer), "--steps", "6"]) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "then", "now"),
    [((), "4", "6"), (CONSTANT, "4", "3"), ((*CONSTANT[:2], "--warmup", "0.5"), "4", "6")],
)
def test_steps_that_would_change_earlier_ones_are_refused(
    given: tuple[str, ...],
    then: str,
    now: str,
    command: list[str],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    out = tmp_path / "run"
    assert main([*command, *given, "--steps", then, "--out", str(out)]) == 0
    before = record(out)
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", str(out), "--steps", now]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--steps {then}, not {now}" in said
    assert "--init-from RUN" in said
    assert record(out) == before


@pytest.mark.slow
def test_a_run_from_another_goes_on_with_its_adapters(
    finished: Path, model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    data, out = tmp_path / "more.jsonl", tmp_path / "run2"
    data.write_text('{"text": "red is a colour"}\n' * 8, "utf-8")
    words = ["finetune", "--init-from", str(finished), "--data", str(data), "--lr", "1e-9"]
    assert main([*words, "--steps", "1", "--out", str(out)]) == 0
    first, second = adapters(finished), adapters(out)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)
    found, before = record(out), record(finished)
    assert found["init_from"] == str(finished.resolve())
    assert (found["model"], found["quant"]) == (before["model"], before["quant"])
    assert found["adapter"] == before["adapter"]
    assert main(["fold", str(out), "--out", str(tmp_path / "folded")]) == 0
    assert main(["export", str(tmp_path / "folded"), "--out", str(tmp_path / "edge")]) == 0
    shutil.move(finished, tmp_path / "gone")
    try:
        assert main(["finetune", "--resume", "--out", str(out)]) == 0
    finally:
        shutil.move(tmp_path / "gone", finished)
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--bits", "3"], "options of quantization or adapters are given with --init-from"),
        (["--rank", "8"], "options of quantization or adapters are given with --init-from"),
        (["--task", "classification"], "the run to train on has the task language"),
    ],
)
def test_what_a_run_from_another_cannot_change_is_refused(
    words: list[str],
    wanted: str,
    finished: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    line = ["finetune", "--init-from", str(finished), "--data", str(data_file)]
    assert main([*line, *words, "--out", str(tmp_path / "run2")]) == 2
    assert wanted in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_only_a_run_can_be_trained_on(
    finished: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["fold", str(finished), "--out", str(tmp_path / "folded")]) == 0
    line = ["finetune", "--init-from", str(tmp_path / "folded"), "--data", str(data_file)]
    assert main([*line, "--out", str(tmp_path / "run2")]) == 2
    assert "give the RUN folder" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run2").exists()
    assert main(["finetune", "--data", str(data_file), "--out", str(tmp_path / "run2")]) == 2
    assert "there is no model to train" in capsys.readouterr().err


def test_the_configuration_of_a_run_repeats_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = tmp_path / "run", tmp_path / "again"
    more = ["--steps", "2", "--pooling", "mean", "--rslora", "--exclude", "lm_head", "*.1.*"]
    assert main([*command, *more, "--out", str(first)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--config", "run/run.yaml", "--out", "again"]) == 0
    assert same(first, again)
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((first / "run.yaml").read_text("utf-8"))
    assert values["exclude"] == ["lm_head", "*.1.*"]
    assert Path(values["model"]).is_absolute()
    spec = finetune_spec(build_parser().parse_args([*command, *more, "--out", str(first)]))
    written = {name.replace("-", "_"): value for name, value in values.items()}
    wanted = spec.options() | {"task": "language"}  # which the data decided
    assert written == {n: v for n, v in wanted.items() if v or type(v) in (int, float)}


def test_data_files_are_looked_for_before_the_model_is_loaded(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = str(tmp_path / "no-such-model")
    line = ["finetune", model, "--data", str(data_file), "--out", str(tmp_path / "run")]
    for option in ("--eval-data", "--calibration"):
        assert main([*line, option, str(tmp_path / "none.jsonl")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"the file of {option} does not exist" in said
        assert "none.jsonl" in said


def test_an_interrupt_says_what_is_saved_and_how_to_go_on(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, show = tmp_path / "a run", View.show

    def interrupt(self: View, report: StepReport) -> None:
        show(self, report)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(View, "show", interrupt)
        assert main([*command, "--steps", "6", "--out", str(out)]) == 130
    said = capfd.readouterr()
    assert "saving after step 4; once more to stop at once" in said.err
    assert f"finetune --resume --out '{out}'" in " ".join(said.out.replace("│", "").split())
    assert not (out / "report.html").exists(), "answers and a report take time"
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "goes on after step 3 of 6" in capfd.readouterr().err
    assert (out / "report.html").exists()


def test_a_second_interrupt_says_what_is_left(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    out, show = tmp_path / "run", View.show

    def interrupt(self: View, report: StepReport) -> None:
        show(self, report)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("qalora_compile.cli.signals._SAME_S", -1.0)
        patch.setattr(View, "show", interrupt)
        assert main([*command, "--steps", "6", "--out", str(out)]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert "not saved after the last checkpoint" in said
    assert f"qalora-compile finetune --resume --out {out}" in said
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert record(out)["status"] == "finished"


def test_before_the_first_step_an_interrupt_names_none(capfd: Any) -> None:
    stop = Stop()
    stop.handle(signal.SIGINT, None)
    assert capfd.readouterr().err == "\nsaving; once more to stop at once\n"

"""`finetune`: what a run folder says after it ended, was killed or failed, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.cli.training_view import View
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.ir.storage import replace_adapters
from qalora_compile.training import FitSpec, Metrics, StepReport
from qalora_compile.training.records.checkpoint import list_checkpoints
from qalora_compile.training.records.log import read_log
from tests import forked
from tests.cli import test_encoder_decoder

Capture = pytest.CaptureFixture[str]
t5_folder = test_encoder_decoder.t5_folder
OPTIONS = [
    *("--steps", "6", "--lr", "1e-2", "--rank", "4", "--batch-size", "3", "--accumulate", "2"),
    *("--dropout", "0.1", "--rslora", "--lora-plus-ratio", "4", "--save-every", "2", "--keep", "3"),
    *("--eval-every", "2", "--seed", "1"),
]


@pytest.fixture(scope="module")
def command(model_folder: Path, data_file: Path) -> list[str]:
    files = ["--data", str(data_file), "--eval-data", str(data_file)]
    return ["finetune", str(model_folder), *files, *OPTIONS]


@pytest.fixture(scope="module")
def run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*command, "--out", str(out), "--report-to", "tensorboard"]) == 0
    return out


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


@pytest.mark.slow
def test_a_run_says_how_it_was_trained(run: Path) -> None:
    found = record(run)
    assert (found["status"], found["step"]) == ("finished", 6)
    assert found["fit"]["accumulate"] == 2
    assert found["fit"]["lora_plus_ratio"] == 4.0
    assert found["adapter"]["dropout"] == 0.1
    assert found["adapter"]["use_rslora"] is True
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [2, 4, 6]


def test_the_log_has_a_line_a_step(run: Path) -> None:
    rows = read_log(run / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert ["held_out" in row for row in rows] == [False, True] * 3
    assert ["held_out_accuracy" in row for row in rows] == [False, True] * 3
    assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= rows[0].keys()


def test_the_report_shows_curves_layers_and_answers(run: Path) -> None:
    text = (run / "report.html").read_text("utf-8")
    for shown in ("Training of model", "held out", "layers.1.mlp.down_proj", "red is a"):
        assert shown in text
    assert "colour" in text


def test_the_adapters_lie_there_for_peft(run: Path) -> None:
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["qalora_pooling"] == record(run)["adapter"]["pooling"]
    stored = load_tensors(run / "adapter" / "adapter_model.safetensors")
    own = load_tensors(run / "adapters.safetensors")
    for name, tensor in own.items():
        assert torch.equal(stored[f"base_model.model.{name}.weight"], tensor)


def test_without_its_libraries_a_run_has_no_report(
    command: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "run"
    assert main([*command, "--steps", "1", "--out", str(out)]) == 0
    assert "there will be no report.html" in capsys.readouterr().err
    assert record(out)["status"] == "finished"
    assert not (out / "report.html").exists()


def test_a_missing_tracker_is_refused_before_anything_is_loaded(
    command: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*command, "--out", str(tmp_path / "run"), "--report-to", "wandb"]) == 2
    said = capsys.readouterr().err
    assert "pip install wandb" in said
    assert "load " not in said
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_what_was_written(run: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(run / "tensorboard")).Reload()
    losses = accumulator.Scalars("train/loss")
    assert [e.step for e in losses] == [1, 2, 3, 4, 5, 6]
    logged = [row["loss"] for row in read_log(run / "log.jsonl")]
    assert [e.value for e in losses] == pytest.approx(logged, rel=1e-6)
    for name in ("held_out/loss", "held_out/accuracy"):
        assert [e.step for e in accumulator.Scalars(name)] == [2, 4, 6]


def test_a_run_that_lost_its_last_steps_goes_on_alike(
    run: Path, command: list[str], tmp_path: Path
) -> None:
    """As after a kill: a checkpoint of step 4, and a log that is ahead of it and torn."""
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(list_checkpoints(cut / "checkpoints")[-1].folder)
    log = (cut / "log.jsonl").read_text("utf-8")
    (cut / "log.jsonl").write_text(log[:-25], "utf-8")
    replace_adapters(load_tensors(cut / "checkpoints/step-00000004/adapters.safetensors"), cut)
    (cut / "checkpoints" / ".step-00000006.x.tmp").mkdir()
    assert main([*command, "--out", str(cut), "--resume"]) == 0
    ends = [load_tensors(folder / "adapters.safetensors") for folder in (run, cut)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    kept = ("step", "loss", "learning_rate")
    rows = [[[row[k] for k in kept] for row in read_log(f / "log.jsonl")] for f in (run, cut)]
    assert rows[0] == rows[1]
    assert not list((cut / "checkpoints").glob(".*"))


def test_an_interrupt_saves_where_it_is_and_resume_goes_on(
    run: Path,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Ctrl-C in step 3, which no checkpoint is due after."""
    out, show = tmp_path / "run", View.show

    def interrupt(self: View, report: StepReport) -> None:
        show(self, report)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(View, "show", interrupt)
        assert main([*command, "--out", str(out)]) == 130
    assert [c.step for c in list_checkpoints(out / "checkpoints")] == [2, 3]
    assert (record(out)["status"], record(out)["step"]) == ("interrupted", 3)
    before = record(run)["held_out"]["before"]
    assert record(out)["held_out"] == {"before": before, "after": None}
    assert main([*command, "--out", str(out), "--resume"]) == 0
    ends = [load_tensors(folder / "adapters.safetensors") for folder in (run, out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert (record(out)["status"], record(out)["step"]) == ("finished", 6)
    after = record(out)["held_out"]["after"]
    assert record(out)["held_out"] == record(run)["held_out"]
    assert before["loss"] != after["loss"]
    stated = capsys.readouterr()
    assert f"{before['loss']:.4f} → {after['loss']:.4f}" in stated.out
    assert f"held out {after['loss']:.4f} ({after['exact_match']:.1%} right)" in stated.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--lr", "2e-2"], "started with --lr 0.01, not 0.02"),
        (["--bits", "3"], "started with --bits unset, not 3"),
        (["--rank", "8"], "started with --rank 4, not 8"),
        (["--exclude", "lm_head"], "started with --exclude none, not lm_head"),
        (["--seq-len", "64"], "started with --seq-len 512, not 64"),
        (["--data", "{other}"], "the contents of --data have changed since"),
        (["{other_model}"], "started with model"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resuming_with_other_options_data_or_model_is_refused(
    run: Path,
    command: list[str],
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: Capture,
    change: list[str],
    said: str,
) -> None:
    other, other_model = tmp_path / "other.jsonl", tmp_path / "model"
    other.write_text(data_file.read_text("utf-8").replace("red", "green"), "utf-8")
    shutil.copytree(model_folder, other_model)
    words = [*command, "--out", str(run), "--resume"]
    if change == ["{other_model}"]:
        words[1] = str(other_model)
    else:
        words += [w.format(other=other) for w in change]
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert main(words) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_checkpoint_of_another_run_is_refused(
    run: Path, command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    shutil.copytree(run, mine)
    assert main([*command, "--out", str(other), "--exclude", "lm_head"]) == 0
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(other / "checkpoints", mine / "checkpoints")
    shutil.rmtree(list_checkpoints(mine / "checkpoints")[-1].folder)
    assert main([*command, "--out", str(mine), "--resume"]) == 2
    assert "layer lm_head was absent, and is" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("evaluated", "said", "logged"),
    [(3, "at step 5 the loss is nan", 4), (2, "after step 4 the held-out loss is nan", 3)],
)
def test_weights_that_diverge_leave_the_last_good_ones(
    run: Path,
    command: list[str],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    evaluated: int,
    said: str,
    logged: int,
) -> None:
    """Step 4 throws them far away. One checkpoint is kept, and one is due after each step."""
    out, factor_at = tmp_path / "run", FitSpec.factor_at
    command = [*command, "--out", str(out), "--eval-every", str(evaluated)]
    command += ["--save-every", "1", "--keep", "1"]

    def far(self: FitSpec, step: int) -> float:
        return 1e27 if step == 3 else factor_at(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(FitSpec, "factor_at", far)
        assert main(command) == 2
    assert said in capsys.readouterr().err
    assert [c.step for c in list_checkpoints(out / "checkpoints")] == [3]
    found = record(out)
    assert (found["status"], found["step"]) == ("failed", 3)
    assert said in found["problem"]
    assert len(read_log(out / "log.jsonl")) == logged
    good = load_tensors(out / "checkpoints/step-00000003/adapters.safetensors")
    for name, tensor in load_tensors(out / "adapters.safetensors").items():
        assert torch.equal(tensor, good[name])
    assert main(["fold", str(out), "--out", str(tmp_path / "folded")]) == 0
    assert main([*command, "--resume"]) == 0
    assert record(out)["status"] == "finished"
    ends = [load_tensors(folder / "adapters.safetensors") for folder in (run, out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_model_that_gives_no_number_is_not_trained(
    command: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> Metrics:
        return Metrics(float("nan"), 0.0, 0.0, None, 6)

    monkeypatch.setattr("qalora_compile.api.finetune_job.held_out_metrics", nothing)
    out = tmp_path / "run"
    assert main([*command, "--out", str(out)]) == 2
    assert "before training the held-out loss is nan" in capsys.readouterr().err
    assert record(out)["status"] == "failed"


def test_what_was_cut_is_in_the_record_and_the_summary(
    command: list[str], data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert main([*command, "--seq-len", "4", "--steps", "1", "--out", str(out)]) == 0
    files = record(out)["files"]
    for part in ("data", "held_out"):
        (file,) = files[part]
        assert (file["path"], file["examples"], file["truncated"]) == (str(data_file), 6, 6)
    said = "6 of 6 examples, 6 of 6 held-out examples"
    assert said in capsys.readouterr().out
    assert said in (out / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_model_with_an_encoder_is_calibrated_on_a_file(
    t5_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Its decoder begins with a token of its own, in these data too."""
    out = tmp_path / "run"
    words = ["finetune", str(t5_folder), "--data", str(data_file), "--out", str(out)]
    words += ["--calibration", str(data_file), "--steps", "1", "--data-cache", str(tmp_path / "c")]
    assert main(words) == 0
    assert record(out)["status"] == "finished"


BAD = {
    "empty data": (["--data", "{empty}"], "no usable example"),
    "tokenizes to nothing": (["--data", "{nothing}"], "no usable example"),
    "accumulate": (["--accumulate", "0"], "accumulate is 0"),
    "dropout": (["--dropout", "1.5"], "dropout is 1.5"),
    "patience alone": (["--patience", "2", "--eval-every", "0"], "patience is 2"),
    "keep": (["--keep", "0"], "--keep is 0"),
    "device": (["--device", "gpu"], "no device is called gpu"),
    "save": (["--save-every", "0"], "--save-every is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(
    name: str, command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words, said = BAD[name]
    empty, nothing = tmp_path / "empty.jsonl", tmp_path / "nothing.jsonl"
    empty.write_text("\n\n", "utf-8")
    nothing.write_text('{"prompt": "red is a", "completion": ""}\n', "utf-8")
    words = [word.format(empty=empty, nothing=nothing) for word in words]
    assert main([*command, "--out", str(tmp_path / "run"), *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_nothing_to_evaluate_on_is_refused(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["finetune", str(model_folder), "--data", str(data_file), "--eval-every", "2"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "give finetune --eval-data" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(command: list[str], tmp_path: Path) -> None:
    """SIGKILL from outside, twice, wherever it hits."""
    start = [*command, "--steps", "60"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert forked.command([*start, "--out", str(whole)]).wait()[0] == 0
    resume: list[str] = []
    for _ in range(2):
        begun = [c.step for c in list_checkpoints(cut / "checkpoints")][-1:]
        child = forked.command([*start, "--out", str(cut), *resume])
        while [c.step for c in list_checkpoints(cut / "checkpoints")][-1:] == begun:
            assert child.running(), "it ended before its next checkpoint"
            time.sleep(0.01)
        child.send(signal.SIGKILL)
        assert child.wait()[0] == -signal.SIGKILL
        resume = ["--resume"]
    assert forked.command([*start, "--out", str(cut), "--resume"]).wait()[0] == 0
    ends = [load_tensors(folder / "adapters.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    steps = [row["step"] for row in read_log(cut / "log.jsonl")]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_two_processes_write_one_run(command: list[str], run: Path, tmp_path: Path) -> None:
    """As torchrun starts them; the losses are those of one with twice the accumulation."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "run"
    words = [*command, "--accumulate", "1", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*start, "-m", "qalora_compile", *words],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("held-out loss") == 1, "one process alone reports"
    losses = [[row["loss"] for row in read_log(f / "log.jsonl")] for f in (run, out)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert record(out)["status"] == "finished"

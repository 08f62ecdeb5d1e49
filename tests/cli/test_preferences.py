"""`finetune --loss dpo` and `orpo`: what a run says, and how it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.training.records.checkpoint import list_checkpoints
from qalora_compile.training.records.log import read_log
from tests.cli.tiny import WORDS

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"{word} is a", "chosen": " colour", "rejected": " number"} for word in WORDS[:6]
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_run_learns_to_prefer_and_goes_on(
    loss: str, model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = ["--data", str(pairs_file), "--eval-data", str(pairs_file), "--eval-every", "4"]
    options = [*("--steps", "24", "--lr", "2e-2", "--rank", "4", "--batch-size", "3")]
    options += ["--loss", loss, "--beta", "0.5", "--save-every", "8", "--neftune-alpha", "0.1"]
    command = ["finetune", str(model_folder), *data, *options]
    once = tmp_path / "once"
    assert main([*command, "--out", str(once)]) == 0
    said = capsys.readouterr()
    assert "held-out pairs preferred" in said.out + said.err
    found = record(once)
    assert (found["fit"]["loss"], found["fit"]["beta"]) == (loss, 0.5)
    assert found["held_out"]["after"]["exact_match"] == 1.0
    assert found["held_out"]["after"]["loss"] < found["held_out"]["before"]["loss"]
    assert [row["step"] for row in read_log(once / "log.jsonl") if "held_out" in row][-1] == 24

    config = ["finetune", "--config", str(once / "run.yaml"), "--out", str(tmp_path / "again")]
    assert main(config) == 0
    first = load_tensors(once / "adapters.safetensors")
    for name, tensor in load_tensors(tmp_path / "again" / "adapters.safetensors").items():
        assert torch.equal(tensor, first[name]), name
    resumed = tmp_path / "again"
    shutil.rmtree(list_checkpoints(resumed / "checkpoints")[-1].folder)
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", str(resumed)]) == 0
    assert "goes on after step 16 of 24" in capsys.readouterr().err
    for name, tensor in load_tensors(resumed / "adapters.safetensors").items():
        assert torch.equal(tensor, first[name]), name


def test_pairs_need_a_loss_of_pairs_and_the_reverse(
    model_folder: Path, data_file: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["finetune", str(model_folder), "--data", str(pairs_file), *out]) == 2
    assert "--loss dpo or orpo" in " ".join(capsys.readouterr().err.split())
    command = ["finetune", str(model_folder), "--data", str(data_file), "--loss", "dpo", *out]
    assert main(command) == 2
    assert "no prompt with two answers" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()

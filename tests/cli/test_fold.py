"""`fold` holds its result against what rounding does to the trained program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.api.run_folder import read_run_file, write_run_file
from qalora_compile.cli.main import main
from qalora_compile.ir.storage import write_program
from tests.models import MLP
from tests.verify.test_equivalence import BadlyConditioned, adapted


def run_folder(folder: Path, model: nn.Module) -> Path:
    """A RUN folder of a model whose adapters are trained to something."""
    torch.manual_seed(0)
    program = adapted(model, torch.randn(4, 40))
    folder.mkdir()
    write_program(program, folder)
    write_run_file(folder, {"model": "m", "status": "finished", "step": 1})
    return folder


def test_a_right_training_of_a_badly_conditioned_model_is_folded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run", BadlyConditioned())
    assert main(["fold", str(run), "--out", str(tmp_path / "folded")]) == 0
    (output,) = read_run_file(tmp_path / "folded")["verified"]["fold"]["outputs"]
    assert output["max_rel"] > 1e-4  # a fixed figure would have refused it
    assert 0 < output["rounding"] < 8
    assert "as a multiple of its rounding error" in capsys.readouterr().out


def test_a_wrong_fold_is_refused_and_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The planted fault is below every fixed figure that was ever used here."""
    run, out = run_folder(tmp_path / "run", MLP(40, 32, 8)), tmp_path / "folded"
    right = qc.fold_adapters

    def wrong(program: qc.Program) -> qc.Program:
        folded = right(program)
        tensors: dict[str, Tensor] = folded.tensors()
        name = next(name for name in tensors if name.endswith(".offset"))
        tensors[name] = tensors[name] + 2e-6 * tensors[name].abs().max()
        return folded.evolve(graph=folded.copy_graph(), tensors=tensors)

    monkeypatch.setattr("qalora_compile.api.fold.fold_adapters", wrong)
    for _ in range(2):  # what an earlier failure has left is replaced
        assert main(["fold", str(run), "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert f"kept in {out}.failed" in said.replace("\n", "")
        assert "times its rounding error" in said
        assert not out.exists()
        kept = read_run_file(tmp_path / "folded.failed")["verified"]["fold"]
        assert kept["verdict"] == "DIFFERENT"

"""`finetune --adapter affine|qat` and `--adaptive-rank`: trained, folded, exported, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.ir.safetensors_io import load_tensors
from tests.pages.test_page import text_of

TRAIN = ("--steps", "6", "--rank", "4", "--lr", "1e-2", "--save-every", "3")


def finetune(model: Path, data: Path, out: Path, *options: str) -> int:
    words = ["finetune", str(model), "--data", str(data), "--out", str(out), "--bits", "3"]
    return main([*words, *TRAIN, *options])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["affine", "qat"])
def test_it_is_trained_folded_exported_and_proved(
    kind: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    run, folded, edge = (tmp_path / name for name in ("run", "folded", "edge"))
    options = ("--adapter", kind, "--gradient-checkpointing")
    assert finetune(model_folder, data_file, run, *options) == 0
    trained = dict(qc.Program.load(run).named_adapter_parameters())
    assert all(bool(tensor.any()) for tensor in trained.values()), "a part got no gradient"
    assert main(["fold", str(run), "--out", str(folded)]) == 0
    assert main(["export", str(folded), "--out", str(edge)]) == 0
    assert main(["verify", str(folded), str(edge), "--max-rel", "1e-4"]) == 0
    assert qc.prove_equivalence(qc.Program.load(run), qc.Program.load(folded)).passed


@pytest.mark.parametrize("kind", ["lora", "qat"])
def test_an_interrupted_run_goes_on_bit_for_bit_and_its_report_has_the_ranks(
    kind: str, model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--adapter", kind, "--adaptive-rank", "1.5")
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert finetune(model_folder, data_file, once, *options) == 0

    class Stopped(BaseException):
        """Stands for a kill, which lets nothing be tidied up."""

    from qalora_compile.training.forward.adaptive_rank import RankAllocator

    real = RankAllocator.step

    def stop(self: RankAllocator, number: int) -> None:
        if number == 5:
            raise Stopped
        real(self, number)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RankAllocator, "step", stop)
        finetune(model_folder, data_file, twice, *options)
    assert finetune(model_folder, data_file, twice, *options, "--resume") == 0
    first, again = (load_tensors(run / "adapters.safetensors") for run in (once, twice))
    assert all(torch.equal(first[name], again[name]) for name in first)
    used = {n: int(t.any(0).sum()) for n, t in first.items() if n.endswith("lora_B")}
    assert sum(used.values()) == round(1.5 * len(used))
    assert "rank" in text_of(once / "report.html")
    other = ("--adapter", kind, "--adaptive-rank", "2", "--resume")
    assert finetune(model_folder, data_file, twice, *other) == 2

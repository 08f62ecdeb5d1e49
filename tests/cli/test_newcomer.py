"""What made newcomers stop: each is a test here, in the file of its command, or in tests/cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import qalora_compile as qc
from qalora_compile._version import __version__
from qalora_compile.capture.peft_adapters import read_peft_adapter
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.view.netron import structure_model
from tests.models import MLP

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folded(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folded model, with a blank in its path."""
    root = tmp_path_factory.mktemp("a folder")
    run = ["finetune", str(model_folder), "--data", str(data_file), "--steps", "1"]
    assert main([*run, "--out", str(root / "run")]) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    return root / "folded"


def test_the_model_names_the_version_that_wrote_it_and_the_record_its_opset(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", str(folded), "--out", str(tmp_path / "edge")]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert f"qalora-compile verify '{folded}' {tmp_path / 'edge'} --max-rel" in said
    model = onnx.load(tmp_path / "edge" / "onnx" / "model_q4.onnx", load_external_data=False)
    assert (model.producer_name, model.producer_version) == ("qalora-compile", __version__)
    (opset,) = (each.version for each in model.opset_import if not each.domain)
    record = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))
    assert record["export"]["opset"] == opset
    structure = structure_model(qc.Program.load(folded))
    assert structure.producer_version == __version__


def test_last_logits_without_a_cache_are_refused(
    folded: Path, model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for line in (["export", str(folded)], ["quantize", str(model_folder)]):
        words = [*line, "--out", str(tmp_path / "edge"), "--last-logits", "--no-kv-cache"]
        assert main(words) == 2
        assert "--last-logits is given with --no-kv-cache" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_merged_decoder_is_refused_where_there_is_none(
    folded: Path, model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    said = "for models with an encoder and a decoder", "is given with --no-kv-cache"
    for line in (["export", str(folded)], ["quantize", str(model_folder)]):
        words = [*line, "--out", str(tmp_path / "edge"), "--merged-decoder"]
        for more, expected in zip(([], ["--no-kv-cache"]), said, strict=True):
            assert main([*words, *more]) == 2
            assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_path_is_called_missing(folded: Path, capsys: Capture) -> None:
    for words in (["none", str(folded)], [str(folded), "none"], ["none", "nothing"]):
        for way in (["--max-rel", "1e-3"], ["--prove"], ["--numeric"]):
            assert main(["verify", *words, *way]) == 2
            assert "there is no file or folder no" in capsys.readouterr().err


def test_a_tensor_in_place_of_a_call_is_explained(tmp_path: Path) -> None:
    program = qc.capture_model(MLP(64, 64, 8), (torch.randn(2, 64),))
    with pytest.raises(UserInputError, match="a call is a tensor") as caught:
        calls: list[Any] = [torch.randn(2, 64)]
        qc.verify_equivalence(program, program, calls, qc.Tolerance(max_abs=1e-3))
    assert "[(x,)]" in str(caught.value)


def test_loftq_has_a_hint_of_its_own(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for start, wanted in (("loftq", "LoftQ, whose base"), ("pissa", "changes the base")):
        text = json.dumps(settings | {"init_lora_weights": start})
        (tmp_path / "adapter_config.json").write_text(text, "utf-8")
        with pytest.raises(UnsupportedError, match=wanted) as caught:
            read_peft_adapter(tmp_path)
        named = "path_initial_model_for_weight_conversion" in str(caught.value)
        assert named == (start == "pissa")


def test_an_export_reports_only_what_concerns_the_model(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", str(folded), "--out", str(tmp_path / "hqq"), "--target", "hqq"]) == 0
    said = capsys.readouterr().out
    assert "real zero-point: " in said
    assert "codes of 4, 3 and 2 bits: " in said
    for absent in ("codes of 8 bits: ", "activation order: ", "other architectures: "):
        assert absent not in said

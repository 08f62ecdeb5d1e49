"""`adapt`: from a PEFT adapter to a folded model, and what is said of those that do not fold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.ir.program import Program
from tests.capture.test_peft_adapter import lora, pooled, trained

Capture = pytest.CaptureFixture[str]
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pooled` and `plain`, of the model in `model_folder`."""
    root = tmp_path_factory.mktemp("adapters")
    for name, config in (("pooled", pooled()), ("plain", lora())):
        trained(model(model_folder), config, root / name)
    return root


def model(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, local_files_only=True)


def test_a_pooled_adapter_goes_to_a_folded_model(
    model_folder: Path, adapters: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, folded = str(tmp_path / "run"), str(tmp_path / "folded")
    words = ["adapt", str(model_folder), "--adapter", str(adapters / "pooled"), "--out", run]
    assert main([*words, "--group-size", "16", "--bits", "8"]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["fold", run, "--out", folded]) == 0
    record = json.loads((tmp_path / "folded" / "run.json").read_text("utf-8"))
    assert record["adapter"]["peft"] == [str(adapters / "pooled")]
    # 8 bits are near the float model, to which PEFT adds the same adapter
    from peft import get_peft_model
    from safetensors.torch import load_file

    theirs = get_peft_model(model(model_folder), pooled()).eval()
    weights = load_file(adapters / "pooled" / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): w for name, w in weights.items()}
    theirs.load_state_dict(named, strict=False)
    ids = torch.randint(0, 13, (2, 7))
    with torch.no_grad():
        expected = theirs(ids).logits
        without = model(model_folder)(ids).logits
    ours = Program.load(folded)(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert float((ours - expected).abs().max()) < 0.03 * float((expected - without).abs().max())


def test_plain_lora_is_refused_approximated_or_merged(
    model_folder: Path, adapters: Path, tmp_path: Path, capsys: Capture
) -> None:
    plain = ["adapt", str(model_folder), "--adapter", str(adapters / "plain"), "--bits", "8"]
    out = tmp_path / "run"
    assert main([*plain, "--out", str(out)]) == 2
    assert "plain LoRA" in capsys.readouterr().err
    assert not out.exists()
    assert main([*plain, "--out", str(out), "--plain", "approximate"]) == 0
    assert "6 approximate: 9" in capsys.readouterr().out
    assert main([*plain, "--out", str(out), "--plain", "merge", "--overwrite"]) == 0
    assert main(["fold", str(out), "--out", str(tmp_path / "folded")]) == 0
    ids = torch.randint(0, 13, (2, 7))
    from peft import PeftModel

    base = model(model_folder)
    with torch.no_grad():
        without = base(ids).logits
        expected = PeftModel.from_pretrained(base, adapters / "plain").eval()(ids).logits
    folded = Program.load(tmp_path / "folded")
    ours = folded(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert float((ours - expected).abs().max()) < 0.03 * float((expected - without).abs().max())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "1", "2"], "2 weights for 1 adapters"),
        (["--method", "gptq"], "needs calibration data"),
        (["--targets", "q_proj", "--group-size", "16"], "no foldable adapter: not among"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    model_folder: Path, adapters: Path, tmp_path: Path, capsys: Capture, more: Any, message: str
) -> None:
    words = ["adapt", str(model_folder), "--adapter", str(adapters / "pooled")]
    assert main([*words, "--out", str(tmp_path / "run"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""`adapt`: from a PEFT adapter to a folded model, and what is said of those that do not fold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from qalora_compile.capture.load_source import load_source
from qalora_compile.capture.peft_adapters import read_peft_adapter
from qalora_compile.cli.main import main
from qalora_compile.config import QuantSpec
from qalora_compile.ir.program import Program
from qalora_compile.quantizers.minmax import quantize_minmax
from tests.capture.checkpoints.gguf_files import write_llama
from tests.capture.checkpoints.models import write_folder
from tests.capture.checkpoints.test_gptq import gptq_config, gptq_layer
from tests.capture.test_peft_adapters import authors_adapter, lora, pooled, trained
from tests.models import llama

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_update_is_merged_into_what_half_precision_rounds(
    model_folder: Path, adapters: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The codes are those of the sum in float32, not of one that lost most of a small update."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    model(model_folder).bfloat16().save_pretrained(base)
    words = ["adapt", str(base), "--adapter", str(adapters / "plain"), "--weights", "1e-4"]
    words += ["--plain", "merge", "--bits", "8"]
    assert main([*words, "--exclude", "v_proj", "--out", str(tmp_path / "run")]) == 0
    assert "2 stay in half precision" in capsys.readouterr().out
    program = Program.load(tmp_path / "run")
    adapter = read_peft_adapter(adapters / "plain", weight=1e-4)
    halves = model(base).bfloat16()
    seen = 0
    for path, update in adapter.updates.items():
        weight = halves.get_parameter(f"{path}.weight").detach().double()
        if "v_proj" in path:
            continue
        total = weight + update.matrix(weight.shape[1])
        found = program.tensors()[f"{path}.scale"]
        wanted, rounded = (
            quantize_minmax(w.float(), QuantSpec(bits=8)).scale for w in (total, total.bfloat16())
        )
        assert torch.equal(found, wanted)
        seen += not torch.equal(found, rounded)
    assert seen == 4


@pytest.mark.parametrize("plain", ["approximate", "merge"])
def test_what_the_reader_has_to_say_is_said(plain: str, tmp_path: Path, capsys: Capture) -> None:
    layer = gptq_layer([], symmetric=True, version=2)
    write_folder(tmp_path / "base", layer, gptq_config(tag="gptq", sym=True))
    trained(llama(), lora(), tmp_path / "adapter")
    words = ["adapt", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    assert main([*words, "--plain", plain, "--out", str(tmp_path / "run")]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "read as v2" in said
    assert ("--plain merge changes their weights" in said) == (plain == "merge")


@pytest.mark.slow
def test_metadata_of_a_gguf_base_are_kept(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf")
    no_table = {"save_embedding_layers": False}  # else PEFT asks the base for its configuration
    trained(load_source(str(base)).model, lora(), tmp_path / "adapter", **no_table)
    words = ["adapt", str(base), "--adapter", str(tmp_path / "adapter"), "--plain", "approximate"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert main(["fold", str(tmp_path / "run"), "--out", str(tmp_path / "folded")]) == 0
    edge = tmp_path / "edge"
    assert main(["export", str(tmp_path / "folded"), "--out", str(edge), "--target", "gguf"]) == 0
    kept, found = (gguf.GGUFReader(str(p)).fields for p in (base, edge / "model.gguf"))
    names = [name for name in kept if name.startswith("tokenizer.")]
    assert names
    assert all(found[name].contents() == kept[name].contents() for name in names)


def test_an_adapter_of_the_authors_script_has_to_be_told(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    authors_adapter(tmp_path / "adapter", model=model(model_folder))
    words = ["adapt", str(model_folder), "--adapter", str(tmp_path / "adapter")]
    words += ["--group-size", "16", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "--pooling mean" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--pooling", "mean"]) == 0
    assert "exact" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["adapter"]["pooling"] == "mean"


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

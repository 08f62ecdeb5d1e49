"""Encoder-decoder models and encoders on the command line, from training to an edge folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.runtime import EncoderDecoder
from qalora_compile.untrusted.artifacts import DECODER_FILE, ENCODER_FILE, MODEL_FILE, model_file
from tests.cli.tiny import WORDS
from tests.zoo.entries import ENTRIES

pytestmark = pytest.mark.slow  # T5 is trained first
Capture = pytest.CaptureFixture[str]
TRAIN = ["--steps", "150", "--lr", "1e-2", "--rank", "8", "--alpha", "16", "--batch-size", "6"]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of one layer as a folder of config, safetensors and tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workspace(t5_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished way through: run, folded, edge."""
    root = tmp_path_factory.mktemp("work")
    data = ["--data", str(data_file), "--eval-data", str(data_file)]
    run, folded, edge = (str(root / name) for name in ("run", "folded", "edge"))
    assert main(["finetune", str(t5_folder), *data, "--out", run, *TRAIN]) == 0
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge]) == 0
    return root


def test_training_learned_the_task(workspace: Path) -> None:
    record = json.loads((workspace / "run" / "run.json").read_text("utf-8"))
    assert record["decoder_start"] == 0
    assert record["held_out"]["after"]["exact_match"] == 1.0


def test_the_folder_says_what_it_holds(workspace: Path) -> None:
    edge = workspace / "edge"
    record = json.loads((edge / "qalora.json").read_text("utf-8"))
    assert record["files"] == [ENCODER_FILE, DECODER_FILE]
    found = {f.relative_to(edge).as_posix() for f in edge.rglob("*")}
    assert {*record["files"], "tokenizer.json"} <= found
    assert not model_file(edge).exists()
    assert not (edge / "genai_config.json").exists()
    assert "runs only Whisper" in record["genai"]
    assert record["decoder_start"] == [0]
    assert record["kv_cache"]
    assert record["context_length"] is None
    assert record["layers"]["quantized"] == 16
    (size,) = record["in_both_files"].values()
    assert size == 14 * 64 * 4


@pytest.mark.parametrize("library", [[], ["--library"]])
def test_verify_finds_them_equal(workspace: Path, library: list[str], capsys: Capture) -> None:
    paths = [str(workspace / name) for name in ("folded", "edge")]
    assert main(["verify", *paths, "--max-rel", "1e-4", "--json", *library]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in report["outputs"]} == {"logits", "encoder_last_hidden_state"}


def test_verify_finds_a_fault(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "edge", tmp_path / "edge")
    path = tmp_path / "edge" / DECODER_FILE
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if "relative_attention_bias" in t.name)
    values = onnx.numpy_helper.to_array(bias)[::-1]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), bias.name))
    onnx.save(model, path)
    words = ["verify", str(workspace / "folded"), str(tmp_path / "edge"), "--max-rel", "1e-4"]
    assert main(words) == 1


def test_generate_answers_as_it_was_trained(workspace: Path, capsys: Capture) -> None:
    for word, kind in (("red", "colour"), ("two", "number")):
        prompt = ["--prompt", f"{word} is a", "--max-new-tokens", "4"]
        assert main(["generate", str(workspace / "edge"), *prompt]) == 0
        assert capsys.readouterr().out.splitlines()[0].strip() == kind


def test_generate_needs_a_token_to_begin_with(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "edge", tmp_path / "edge")
    path = tmp_path / "edge" / "qalora.json"
    record = json.loads(path.read_text("utf-8")) | {"decoder_start": []}
    path.write_text(json.dumps(record), "utf-8")
    assert main(["generate", str(tmp_path / "edge"), "--prompt", "red is a"]) == 2


def test_inspect_lists_the_layers_of_both_files(workspace: Path, capsys: Capture) -> None:
    assert main(["inspect", str(workspace / "edge"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = {row["path"]: row["file"] for row in found["layers"]}
    assert files["encoder.block.0.layer.0.SelfAttention.q"] == "encoder_model_q4.onnx"
    assert files["decoder.block.0.layer.1.EncDecAttention.k"] == "encoder_model_q4.onnx"
    assert files["decoder.block.0.layer.1.EncDecAttention.q"] == "decoder_model_q4.onnx"
    assert found["totals"]["layers to quantize"] == 16
    assert "lm_head.weight" in found["totals"]["in both files"]
    assert main(["inspect", str(workspace / "edge"), "--group"]) == 0


def test_bench_says_that_it_cannot(workspace: Path, capsys: Capture) -> None:
    assert main(["bench", str(workspace / "edge")]) == 2
    assert "an encoder and a decoder" in capsys.readouterr().err


def test_bad_export_options_are_refused(workspace: Path, tmp_path: Path, capsys: Capture) -> None:
    out = ["--out", str(tmp_path / "edge")]
    assert main(["export", str(workspace / "folded"), *out, "--last-logits"]) == 2
    assert "without --last-logits" in capsys.readouterr().err
    assert not (tmp_path / "edge").exists()


def test_data_of_another_form_are_refused(t5_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "red is a colour"}\n', "utf-8")
    words = ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["finetune", str(t5_folder), *words]) == 2
    assert "learns text from text" in capsys.readouterr().err


def test_a_model_that_names_no_start_is_refused(
    t5_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(t5_folder, tmp_path / "t5")
    for name in ("config.json", "generation_config.json"):
        value = json.loads((tmp_path / "t5" / name).read_text("utf-8"))
        value.pop("decoder_start_token_id", None)
        (tmp_path / "t5" / name).write_text(json.dumps(value), "utf-8")
    words = ["--data", str(data_file), "--out", str(tmp_path / "run")]
    assert main(["finetune", str(tmp_path / "t5"), *words]) == 2
    assert "does not name a start token" in capsys.readouterr().err


def test_quantize_needs_no_training(t5_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "edge")
    words = ["--exclude", "re:^encoder.*wi$", "--bits", "8"]
    assert main(["quantize", str(t5_folder), "--out", out, *words]) == 0
    assert "encoder_model_q4.onnx" in capsys.readouterr().out
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(t5_folder).eval()
    ids = torch.tensor([[3, 9, 10, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits.numpy()
    exported = EncoderDecoder.open(out)
    encoded = exported.encode({"input_ids": ids.numpy()})
    found, _ = exported.step(np.array([[0]]), encoded, exported.empty_cache())
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()  # of 8 bits


def test_quantize_takes_a_bart_with_its_buffer(tmp_path: Path) -> None:
    model: Any = ENTRIES["bart"].build(layers=1)
    torch.nn.init.normal_(model.get_buffer("final_logits_bias"))
    model.save_pretrained(tmp_path / "bart")
    out = tmp_path / "edge"
    assert main(["quantize", str(tmp_path / "bart"), "--out", str(out)]) == 0
    graph = onnx.load(out / DECODER_FILE).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert np.array_equal(stored["final_logits_bias"], model.get_buffer("final_logits_bias"))
    record = json.loads((out / "qalora.json").read_text("utf-8"))
    assert record["decoder_start"] == [2]
    assert record["context_length"] == 1024


def test_whisper_is_quantized_and_not_given_text(tmp_path: Path, capsys: Capture) -> None:
    model: Any = ENTRIES["whisper"].build(layers=1)
    model.save_pretrained(tmp_path / "whisper")
    (tmp_path / "whisper" / "preprocessor_config.json").write_text("{}", "utf-8")
    out = tmp_path / "edge"
    assert main(["quantize", str(tmp_path / "whisper"), "--out", str(out)]) == 0
    assert (out / "preprocessor_config.json").is_file()
    record = json.loads((out / "qalora.json").read_text("utf-8"))
    assert "3000 frames" in record["genai"]
    assert record["context_length"] == 64
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "Hello"]) == 2
    assert "audio features" in capsys.readouterr().err
    exported = EncoderDecoder.open(out, start=record["decoder_start"])
    sound = {"audio_features": np.zeros((1, 16, 100), np.float32)}
    assert len(list(exported.generate(sound, max_new_tokens=3))) == 3


def test_an_encoder_is_exported_as_one_graph(tmp_path: Path, capsys: Capture) -> None:
    """BERT, as `finetune` would leave it: a program with its description."""
    import qalora_compile as qc
    from qalora_compile.api.run_folder import save_description, write_run_file

    model = ENTRIES["bert"].build()
    program = qc.quantize_groups(qc.capture_model(model, *ENTRIES["bert"].inputs(2, 9, 0)))
    program.save(tmp_path / "folded")
    save_description(model, tmp_path / "folded")
    write_run_file(tmp_path / "folded", {"model": "bert"})
    words = [str(tmp_path / "folded"), "--out", str(tmp_path / "edge")]
    assert main(["export", *words]) == 0
    assert "not a generating transformers model" in capsys.readouterr().out
    record = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))
    assert (record["files"], record["kv_cache"]) == ([MODEL_FILE], False)
    assert record["context_length"] is None
    assert "key-value cache" in record["genai"]
    paths = [str(tmp_path / "folded"), str(tmp_path / "edge")]
    assert main(["verify", *paths, "--max-rel", "1e-4"]) == 0

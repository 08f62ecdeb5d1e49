"""Encoders on the command line: quantized, pooled, with what other libraries ask of a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional

from qalora_compile.api.pooling import Pooling, recorded_pooling
from qalora_compile.capture.sentence import read_sentence_parts
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.onnx.sentence_transformers import write_sentence_files
from qalora_compile.ir.program import Program
from qalora_compile.untrusted.artifacts import model_file

Capture = pytest.CaptureFixture[str]
TEXTS = ["the film is fine", "awful", "so dull and very poor the film is"]


def sentence_folder(source: Path, target: Path, *, apart: bool = False, **pooling: Any) -> Path:
    """The encoder as a folder of sentence-transformers; `apart`: as older versions lay it out."""
    inside = target / "0_Transformer" if apart else target
    shutil.copytree(source, inside)
    config = json.loads((source / "config.json").read_text("utf-8"))
    settings = {"sentence_bert_config.json": {"max_seq_length": 30, "do_lower_case": False}}
    given: dict[str, Any] = {"pooling": "mean", "normalize": True} | pooling
    write_sentence_files(target, config, settings=settings, **given)
    if apart:
        rows = json.loads((target / "modules.json").read_text("utf-8"))
        rows[0]["path"] = "0_Transformer"
        (target / "modules.json").write_text(json.dumps(rows), "utf-8")
        (target / "sentence_bert_config.json").rename(inside / "sentence_bert_config.json")
    return target


def states(folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Encoded texts, and what transformers makes of them: states of tokens, and their mask."""
    from transformers import AutoTokenizer, BertModel

    encoded = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(encoded.input_ids, encoded.attention_mask).last_hidden_state
    return encoded, hidden, encoded.attention_mask[..., None]


def run(edge: Path, encoded: Any) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(model_file(edge))
    feed = {i.name: encoded[i.name].numpy().astype(np.int64) for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_is_quantized_and_pooled(
    encoder_folder: Path, tmp_path: Path, pooling: str
) -> None:
    words = ["quantize", str(encoder_folder), "--out", str(tmp_path / "edge"), "--bits", "8"]
    words += ["--group-size", "8"]
    assert main([*words, "--pooling", pooling, "--normalize"]) == 0
    encoded, hidden, mask = states(encoder_folder)
    found = run(tmp_path / "edge", encoded)
    near = 0.02 * float(hidden.abs().max())  # of 8 bits
    assert torch.allclose(found["last_hidden_state"] * mask, hidden * mask, atol=near)
    own = found["last_hidden_state"]
    wanted = (own * mask).sum(1) / mask.sum(1) if pooling == "mean" else own[:, 0]
    wanted = functional.normalize(wanted, dim=1)
    assert torch.allclose(found["sentence_embedding"], wanted, atol=1e-5)
    parts = read_sentence_parts(tmp_path / "edge")
    assert parts is not None
    assert (parts.encoder, parts.pooling, parts.normalize) == (tmp_path / "edge", pooling, True)
    record = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))
    assert record["pooling"] == {"pooling": pooling, "normalize": True, "in_graph": True}


@pytest.mark.parametrize("apart", [False, True])
def test_a_folder_of_sentence_transformers_is_read_and_written(
    encoder_folder: Path, tmp_path: Path, apart: bool, capsys: Capture
) -> None:
    source = sentence_folder(encoder_folder, tmp_path / "source", apart=apart)
    words = ["quantize", str(source), "--group-size", "8", "--out"]
    assert main([*words, str(tmp_path / "edge")]) == 0
    edge = tmp_path / "edge"
    assert "sentence_embedding" not in run(edge, states(encoder_folder)[0])
    parts = read_sentence_parts(edge)
    assert parts is not None and (parts.pooling, parts.normalize) == ("mean", True)
    settings = json.loads((edge / "sentence_bert_config.json").read_text("utf-8"))
    opened = {"model_args": {"file_name": "model_q4.onnx"}}
    assert settings == {"max_seq_length": 30, "do_lower_case": False} | opened
    config = json.loads((edge / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["BertModel"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "other"), "--pooling", "cls"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "trained for --pooling mean --normalize, according to its modules.json" in message
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_an_adapted_encoder_is_exported_with_its_pooling(
    encoder_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """From PEFT's adapter to the edge: proved, and near what transformers and PEFT compute."""
    peft = pytest.importorskip("peft")
    from transformers import BertModel

    source = sentence_folder(encoder_folder, tmp_path / "source")
    model = BertModel.from_pretrained(source)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    theirs = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    path = {name: str(tmp_path / name) for name in ("run", "folded", "edge", "none")}
    words = ["adapt", str(source), "--adapter", str(tmp_path / "adapter"), "--plain", "merge"]
    assert main([*words, "--bits", "8", "--group-size", "8", "--out", path["run"]]) == 0
    assert main(["fold", path["run"], "--out", path["folded"]]) == 0
    words = ["export", path["folded"], "--out"]
    assert main([*words, path["edge"], "--pooling", "mean", "--normalize"]) == 0
    assert "sentence_embedding" not in Program.load(path["folded"]).signature.outputs
    sides = [path["folded"], path["edge"]]
    assert main(["verify", *sides, "--max-rel", "1e-4"]) == 0
    capsys.readouterr()
    assert main(["verify", *sides, "--prove"]) == 0
    assert "PROVED UNDER" in capsys.readouterr().out
    encoded, _, mask = states(encoder_folder)
    with torch.no_grad():
        hidden = theirs.eval()(encoded.input_ids, encoded.attention_mask).last_hidden_state
    wanted = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    found = run(tmp_path / "edge", encoded)["sentence_embedding"]
    assert float((found * wanted).sum(1).min()) > 0.999
    capsys.readouterr()
    assert main([*words, path["none"], "--target", "float", "--pooling", "mean"]) == 2
    assert "--pooling has no effect with target" in capsys.readouterr().err


REFUSED = {
    "normalize alone": (["--normalize"], "has no effect without --pooling"),
    "logits of the last token": (["--last-logits"], "the model does not generate text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_an_encoder_has_no_use_for_is_refused(
    encoder_folder: Path, tmp_path: Path, kind: str, capsys: Capture
) -> None:
    more, message = REFUSED[kind]
    assert main(["quantize", str(encoder_folder), "--out", str(tmp_path / "edge"), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "edge").exists()


def test_a_language_model_has_no_embedding_of_a_sentence(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["quantize", str(model_folder), "--out", str(tmp_path / "edge"), "--pooling", "mean"]
    assert main(words) == 2
    assert "and not last_hidden_state" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_classifier_is_quantized_with_the_names_of_its_classes(
    encoder_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(encoder_folder)
    config.id2label = {0: "bad", 1: "good", 2: "so-so"}
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    shutil.copytree(encoder_folder, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    words = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "edge"), "--bits", "8"]
    assert main([*words, "--group-size", "8"]) == 0
    encoded, *_ = states(encoder_folder)
    with torch.no_grad():
        logits = model(encoded.input_ids, encoded.attention_mask).logits
    found = run(tmp_path / "edge", encoded)["logits"]
    assert torch.allclose(found, logits, atol=0.02 * float(logits.abs().max()))
    record = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))
    assert record["classes"] == ["bad", "good", "so-so"]
    named = AutoConfig.from_pretrained(tmp_path / "edge").id2label
    assert named == {0: "bad", 1: "good", 2: "so-so"}


def test_poolings_of_both_forms_are_read_and_others_kept_as_they_are_called(
    encoder_folder: Path, tmp_path: Path
) -> None:
    source = sentence_folder(encoder_folder, tmp_path / "source", normalize=False)
    pooling = source / "1_Pooling" / "config.json"

    def read(**config: Any) -> str | None:
        pooling.write_text(json.dumps(config), "utf-8")
        parts = read_sentence_parts(source)
        return parts.pooling if parts else None

    assert read(embedding_dimension=32, pooling_mode="cls") == "cls"  # of version 6
    assert read(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False) == "cls"
    assert read(pooling_mode_max_tokens=True) == "pooling_mode_max_tokens"
    assert main(["quantize", str(source), "--out", str(tmp_path / "edge")]) == 0
    assert not (tmp_path / "edge" / "modules.json").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"type": "a.Transformer", "path": "../outside"}], "outside the folder"),
        ([{"type": "a.Pooling", "path": ""}], "names no Transformer"),
        ([{"path": ""}], "not a list of parts"),
        ({}, "not a list of parts"),
    ],
)
def test_a_list_of_parts_that_is_none_is_refused(tmp_path: Path, rows: Any, message: str) -> None:
    (tmp_path / "modules.json").write_text(json.dumps(rows), "utf-8")
    with pytest.raises(UserInputError, match=message):
        read_sentence_parts(tmp_path)


@pytest.mark.parametrize("found", [{"bogus": 1}, [], {"pooling": 1, "normalize": True}, "mean"])
def test_a_malformed_record_of_pooling_is_refused(found: object) -> None:
    """The record may come from anybody: it was given to a constructor as it was."""
    with pytest.raises(UserInputError, match="malformed"):
        recorded_pooling({"pooling": found})
    assert recorded_pooling({}) == recorded_pooling({"pooling": None}) == Pooling()

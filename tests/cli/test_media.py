"""`finetune` on images and audio: trained, folded, exported and run, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.untrusted.media_processor import load_preprocessor
from tests.media import (
    COLOURS,
    RATE,
    write_audio_model,
    write_image_model,
    write_images,
    write_recordings,
    write_rows,
    write_tone,
)

Capture = pytest.CaptureFixture[str]
STEPS = ["--steps", "30", "--batch-size", "4", "--lr", "1e-2", "--rank", "2"]


def _road(model: Path, data: Path, root: Path, *more: str) -> Path:
    """Fine-tune, fold and export; the edge folder."""
    run = ["finetune", str(model), "--data", str(data), "--eval-data", str(data)]
    assert main([*run, *STEPS, *more, "--out", str(root / "run")]) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    assert main(["export", str(root / "folded"), "--out", str(root / "edge")]) == 0
    return root / "edge"


def _labels(edge: Path, data: Path) -> tuple[list[str], list[str], list[str]]:
    """What ONNX Runtime and torch say of each file, one by one, and the labels of the data."""
    processor = load_preprocessor(edge)
    classes = json.loads((edge / "qalora.json").read_text("utf-8"))["classes"]
    session = onnxruntime.InferenceSession(edge / "onnx" / "model_q4.onnx")
    program = qc.Program.load(edge.parent / "folded")
    exported, ours, wanted = [], [], []
    for line in data.read_text("utf-8").splitlines():
        row = json.loads(line)
        values = processor.read(data.parent / row[processor.medium])
        batch = {name: value[None] for name, value in values.items()}
        (logits,) = session.run(None, batch)
        with torch.no_grad():
            output = program(**{k: torch.from_numpy(v) for k, v in batch.items()})["logits"]
        torch.testing.assert_close(torch.from_numpy(logits), output, rtol=1e-3, atol=1e-3)
        exported.append(classes[int(logits.argmax())])
        ours.append(classes[int(output.argmax())])
        wanted.append(row["label"])
    return exported, ours, wanted


def _accuracies(root: Path, data: Path, capsys: Capture) -> list[float]:
    """What `eval` says of each form of a model."""
    models = [str(root / name) for name in ("run", "folded", "edge")]
    capsys.readouterr()
    assert main(["eval", *models, "--data", str(data), "--json"]) == 0
    return [row["accuracy"] for row in json.loads(capsys.readouterr().out)]


@pytest.mark.slow
def test_images_from_data_to_onnx_runtime(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = write_image_model(tmp_path / "vit"), write_images(tmp_path / "data")
    edge = _road(model, data, tmp_path)
    said = capsys.readouterr()
    assert "image and label (12)" in said.out
    assert "blue 4, green 4, red 4" in said.out
    assert "tokens/s" not in said.err
    exported, ours, wanted = _labels(edge, data)
    assert exported == ours == wanted
    assert (edge / "preprocessor_config.json").is_file()
    config = json.loads((edge / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    capsys.readouterr()
    verify = ["verify", str(tmp_path / "folded"), str(edge)]
    assert main([*verify, "--max-rel", "1e-3"]) == 0
    assert main(["inspect", str(edge)]) == 0
    assert _accuracies(tmp_path, data, capsys) == [1.0, 1.0, 1.0]
    card = (edge / "README.md").read_text("utf-8")
    assert 'pipeline_tag: "image-classification"' in card
    (code,) = re.findall(r"```python\n(.*?AutoImageProcessor.*?)```", card, re.DOTALL)
    Image.open(data.parent / "images" / "0.png").save(edge / "picture.jpg")
    monkeypatch.chdir(edge)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "red\n"


@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True], ids=["no-mask", "mask"])
def test_audio_from_data_to_onnx_runtime(mask: bool, tmp_path: Path, capsys: Capture) -> None:
    model = write_audio_model(tmp_path / "wav2vec2", mask=mask)
    data = write_recordings(tmp_path / "data")
    edge = _road(model, data, tmp_path, "--batches", "by-length")
    assert "audio and label (8)" in capsys.readouterr().out
    exported, ours, wanted = _labels(edge, data)
    assert exported == ours == wanted
    assert _accuracies(tmp_path, data, capsys) == [1.0, 1.0, 1.0]
    card = (edge / "README.md").read_text("utf-8")
    assert 'pipeline_tag: "audio-classification"' in card
    assert "AutoFeatureExtractor" in card


def _losses(run: Path) -> list[float]:
    lines = (run / "log.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_checkpoint_with_its_own_head_is_evaluated(tmp_path: Path, capsys: Capture) -> None:
    model, data = write_image_model(tmp_path / "vit", classes=3), write_images(tmp_path / "data")
    for number, colour in enumerate(COLOURS):  # as the configuration calls its classes
        data.write_text(data.read_text("utf-8").replace(f'"{colour}"', f'"LABEL_{number}"'))
    capsys.readouterr()
    assert main(["eval", str(model), "--data", str(data), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    theirs = ViTForImageClassification.from_pretrained(model).eval()
    processor, right = load_preprocessor(model), 0
    for number, line in enumerate(data.read_text("utf-8").splitlines()):
        pixels = processor.read(data.parent / json.loads(line)["image"])["pixel_values"]
        with torch.no_grad():
            right += int(theirs(torch.from_numpy(pixels)[None]).logits.argmax()) == number % 3
    assert (row["form"], row["accuracy"]) == ("float", right / 12)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_files(tmp_path: Path) -> None:
    model, data = write_image_model(tmp_path / "vit"), write_images(tmp_path / "data")
    words = ["finetune", str(model), "--data", str(data), "--batch-size", "4"]
    words += ["--schedule", "constant", "--warmup", "0"]
    at_once, parts = tmp_path / "at-once", tmp_path / "parts"
    assert main([*words, "--steps", "6", "--out", str(at_once)]) == 0
    assert main([*words, "--steps", "3", "--out", str(parts)]) == 0
    assert main(["finetune", "--resume", "--out", str(parts), "--steps", "6"]) == 0
    a, b = (dict(qc.Program.load(p).named_adapter_parameters()) for p in (at_once, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert _losses(at_once) == _losses(parts)
    (log,) = {
        tuple(json.loads(line)) for line in (parts / "log.jsonl").read_text("utf-8").splitlines()
    }
    assert "unit" not in log


def test_a_head_for_other_classes_is_replaced_and_it_is_said(
    tmp_path: Path, capsys: Capture
) -> None:
    model = write_image_model(tmp_path / "vit", classes=10)
    words = ["finetune", str(model), "--data", str(write_images(tmp_path / "data"))]
    assert main([*words, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "head, for 10 other classes, is replaced" in capsys.readouterr().err


def test_gptq_calibrates_on_images(tmp_path: Path) -> None:
    model, data = write_image_model(tmp_path / "vit"), write_images(tmp_path / "data")
    words = ["finetune", str(model), "--data", str(data), "--method", "gptq", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    program = qc.Program.load(tmp_path / "run")
    assert {site.bits for site in program.plan.to_quantize()} == {4}


def _refused(words: list[str], capsys: Capture) -> str:
    assert main(words) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--batches", "packed"], "--batches packed is for texts"),
        (["--data-cache", "cache"], "--data-cache is for texts"),
        (["--learn", "everything"], "--learn everything is for texts"),
        (["--loss", "dpo"], "--loss dpo or orpo is for texts"),
    ],
)
def test_options_for_texts_are_refused(
    option: list[str], named: str, tmp_path: Path, capsys: Capture
) -> None:
    model, data = write_image_model(tmp_path / "vit"), write_images(tmp_path / "data", 3)
    words = ["finetune", str(model), "--data", str(data), "--out", str(tmp_path / "run"), *option]
    assert named in _refused(words, capsys)
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_take_the_data_are_refused(
    tmp_path: Path, model_folder: Path, capsys: Capture
) -> None:
    images = write_images(tmp_path / "data", 3)
    sounds = write_recordings(tmp_path / "more", 2)
    vision = write_image_model(tmp_path / "vit")
    out = ["--out", str(tmp_path / "run")]
    said = _refused(["finetune", str(model_folder), "--data", str(images), *out], capsys)
    assert "the data are images with labels, and the model generates text" in said
    said = _refused(["finetune", str(vision), "--data", str(sounds), *out], capsys)
    assert "transformers has no head for 'vit' to classify audio data" in said
    (vision / "preprocessor_config.json").unlink()
    said = _refused(["finetune", str(vision), "--data", str(images), *out], capsys)
    assert "holds no preprocessor_config.json" in said


@pytest.mark.parametrize(
    ("rate", "message"), [(RATE, None), (RATE * 2, "4000 samples a second, and the model takes")]
)
def test_a_wrong_sampling_rate_names_the_command_that_resamples(
    rate: int, message: str | None, tmp_path: Path, capsys: Capture
) -> None:
    model = write_audio_model(tmp_path / "wav2vec2")
    tones: list[dict[str, Any]] = []
    for name in ("a b", "c"):
        write_tone(tmp_path / f"{name}.wav", 200, 600, rate=rate)
        tones.append({"audio": f"{name}.wav", "label": name})
    data = write_rows(tmp_path / "data.jsonl", tones)
    words = ["finetune", str(model), "--data", str(data), "--steps", "1"]
    words += ["--out", str(tmp_path / "run")]
    if message is None:
        assert main(words) == 0
        return
    said = _refused(words, capsys)
    assert message in said
    assert f"data.jsonl:1: {tmp_path}/a b.wav" in said
    assert f"ffmpeg -i '{tmp_path}/a b.wav' -ar {RATE} '{tmp_path}/a b_{RATE}.wav'" in said


def test_features_in_a_batch_are_those_of_the_files(tmp_path: Path) -> None:
    from qalora_compile.training.data.example import collate
    from qalora_compile.training.data.load_media import load_media

    processor = load_preprocessor(write_audio_model(tmp_path / "wav2vec2", mask=True))
    data = load_media(write_recordings(tmp_path / "data", 2), processor, ("high", "low"))
    batch = collate(data.examples[0:2])
    assert batch.labels.tolist() == [1, 0]
    assert batch.tokens == 2
    assert batch.attention_mask.sum(1).tolist() == [400, 440]
    media = data.examples[0].media
    assert media is not None
    assert np.allclose(batch.input_ids[0, :400], media.features)
    assert not batch.input_ids[0, 400:].any()

"""A real encoder learns to tell good film reviews from bad ones, and does so in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from qalora_compile.cli.main import main
from qalora_compile.untrusted.artifacts import model_file

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.mark.slow
def test_minilm_on_film_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from assets import encoder_path, write_review_data
    from transformers import AutoTokenizer

    train, test = write_review_data(tmp_path, train=2000, test=200)
    words = ["finetune", str(encoder_path()), "--data", str(train), "--eval-data", str(test)]
    words += ["--task", "classification", "--seq-len", "48"]
    words += ["--steps", "120", "--batch-size", "16", "--lr", "1e-3", "--rank", "8", "--alpha", "8"]
    run, folded, edge = (str(tmp_path / name) for name in ("run", "folded", "edge"))
    assert main([*words, "--out", run]) == 0
    held_out = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["held_out"]
    before, after = held_out["before"], held_out["after"]
    assert after["exact_match"] > max(0.62, before["exact_match"] + 0.04)
    assert after["loss"] < 0.92 * before["loss"]
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge]) == 0
    assert main(["verify", run, edge, "--max-rel", "1e-4"]) == 0

    session = onnxruntime.InferenceSession(model_file(tmp_path / "edge"))
    tokenizer = AutoTokenizer.from_pretrained(edge)
    classes = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))["classes"]
    rows = [json.loads(line) for line in test.read_text("utf-8").splitlines()]
    right = 0
    for row in rows:
        encoded = tokenizer(row["text"], truncation=True, max_length=48, return_tensors="np")
        feed = {i.name: encoded[i.name].astype(np.int64) for i in session.get_inputs()}
        (logits,) = session.run(None, feed)
        right += classes[int(logits.argmax())] == row["label"]
    assert right / len(rows) == pytest.approx(held_out["after"]["exact_match"], abs=0.011)

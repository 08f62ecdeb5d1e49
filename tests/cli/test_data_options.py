"""How `finetune` reads data: several files, packed rows, a cache, and a classification task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qalora_compile.capture.classifier import load_classifier
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.untrusted.artifacts import model_file
from tests.cli.tiny import BAD, FILLER, GOOD

Capture = pytest.CaptureFixture[str]


def reviews(path: Path, count: int, seed: int) -> Path:
    """Filler words with two that tell."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        label = ("bad", "good")[index % 2]
        telling = rng.choice(GOOD if label == "good" else BAD, 2).tolist()
        words = rng.permutation([*rng.choice(FILLER, rng.integers(2, 5)), *telling])
        rows.append({"text": " ".join(words), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def classifier(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished way through: train, test, run, folded, edge."""
    root = tmp_path_factory.mktemp("classifier")
    train, test = reviews(root / "train.jsonl", 240, 0), reviews(root / "test.jsonl", 30, 1)
    words = ["finetune", str(encoder_folder), "--data", str(train), "--eval-data", str(test)]
    words += ["--batches", "by-length", "--out", str(root / "run")]
    words += ["--steps", "150", "--lr", "1e-2", "--batch-size", "12", "--group-size", "4"]
    assert main(words) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    assert main(["export", str(root / "folded"), "--out", str(root / "edge")]) == 0
    return root


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


@pytest.mark.slow
def test_a_classifier_learns_its_classes(classifier: Path) -> None:
    found = record(classifier / "run")
    assert found["reading"]["classes"] == ["bad", "good"]
    before, after = (found["held_out"][when] for when in ("before", "after"))
    assert before["exact_match"] < 0.8
    assert after["exact_match"] == after["token_accuracy"] > 0.85
    assert after["loss"] < 0.6 * before["loss"]
    program = Program.load(classifier / "run")
    assert program.trained == ("classifier.weight", "classifier.bias")
    rows = {site.path: site for site in program.plan}
    assert rows["classifier"].decision == "keep"
    assert rows["bert.pooler.dense"].bits == 4


@pytest.mark.slow
def test_the_exported_classifier_tells_the_classes_apart(
    classifier: Path, encoder_folder: Path
) -> None:
    from transformers import AutoTokenizer

    for pair in (("run", "folded"), ("folded", "edge")):
        assert main(["verify", *(str(classifier / n) for n in pair), "--max-rel", "1e-4"]) == 0
    edge = json.loads((classifier / "edge" / "qalora.json").read_text("utf-8"))
    assert edge["classes"] == ["bad", "good"]
    described = json.loads((classifier / "edge" / "config.json").read_text("utf-8"))
    assert described["id2label"] == {"0": "bad", "1": "good"}
    assert described["architectures"] == ["BertForSequenceClassification"]
    session = onnxruntime.InferenceSession(model_file(classifier / "edge"))
    tokenizer = AutoTokenizer.from_pretrained(classifier / "edge")
    lines = (classifier / "test.jsonl").read_text("utf-8").splitlines()
    texts, labels = zip(*(json.loads(line).values() for line in lines), strict=True)
    encoded = tokenizer(list(texts), return_tensors="np", padding=True)
    feed = {i.name: encoded[i.name].astype(np.int64) for i in session.get_inputs()}
    (logits,) = session.run(None, feed)
    assert logits.shape == (30, 2)
    found = [edge["classes"][i] for i in logits.argmax(1)]
    right = sum(one == other for one, other in zip(found, labels, strict=True)) / 30
    assert right == record(classifier / "run")["held_out"]["after"]["exact_match"] > 0.85


@pytest.mark.slow
def test_a_classifier_that_was_interrupted_goes_on(
    classifier: Path, encoder_folder: Path, capsys: Capture
) -> None:
    """As after all steps: nothing is left to do, and the head is the trained one."""
    words = ["finetune", str(encoder_folder), "--data", str(classifier / "train.jsonl"), "--resume"]
    words += ["--out", str(classifier / "run"), "--steps", "150", "--lr", "1e-2"]
    words += ["--batch-size", "12", "--eval-data", str(classifier / "test.jsonl")]
    words += ["--group-size", "4"]
    task = ["--task", "classification", "--batches", "by-length"]
    held_out = record(classifier / "run")["held_out"]
    assert main([*words, *task]) == 0
    assert record(classifier / "run")["held_out"] == held_out
    assert main(words) == 0, "options that are not given are those of the run"
    assert main([*words, *task[:2], "--batches", "shuffled"]) == 2
    assert "--batches by-length, not shuffled" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "the film", "label": "so-so"}, "'so-so' does not occur in the training data"),
        ({"text": "the film"}, "the line has no label"),
    ],
)
def test_held_out_data_of_other_classes_are_refused(
    classifier: Path, encoder_folder: Path, tmp_path: Path, capsys: Capture, row: Any, message: str
) -> None:
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps(row), "utf-8")
    words = ["finetune", str(encoder_folder), "--data", str(classifier / "train.jsonl")]
    words += ["--eval-data", str(odd), "--task", "classification", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_classify_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with pytest.raises(UserInputError, match="Hugging Face folder"):
        load_classifier("a.module:factory", ("a", "b"))
    config = BertConfig.from_pretrained(encoder_folder)
    config.id2label = {0: "yes", 1: "no"}
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        load_classifier(str(tmp_path), ("no", "yes"))
    for file in encoder_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = load_classifier(str(tmp_path), ("no", "yes"))
    assert kept.model.config.id2label == {0: "yes", 1: "no"}  # type: ignore[union-attr]
    assert kept.head == ("classifier.weight", "classifier.bias")
    own = kept.model.state_dict()["classifier.weight"]
    assert own.equal(model.state_dict()["classifier.weight"])
    with pytest.raises(UserInputError, match="classes are yes, no, the data.s maybe, no"):
        load_classifier(str(tmp_path), ("maybe", "no"))


@pytest.mark.slow
def test_packed_rows_train_the_same_run_folder(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    second = tmp_path / "more.jsonl"
    second.write_text('{"text": "red green blue"}\n{"text": "one two three"}\n', "utf-8")
    words = ["finetune", str(model_folder), "--data", str(data_file), str(second)]
    words += ["--eval-data", str(data_file), "--batches", "packed", "--seq-len", "16"]
    words += ["--data-cache", str(cache), "--out", str(out), "--rank", "4", "--batch-size", "2"]
    words += ["--lr", "1e-2", "--steps", "60", "--save-every", "10"]
    words += ["--seed", "20241231235959"]  # a time of day, as many take
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "3 rows, 79% full" in shown
    found = record(out)
    assert [Path(name).name for name in found["data"]] == ["train.jsonl", "more.jsonl"]
    assert found["held_out"]["after"]["loss"] < 0.5 * found["held_out"]["before"]["loss"]
    # the folder holds the program as it takes one example a row
    assert [len(leaf.shape) for leaf in Program.load(out).signature.inputs] == [2, 2]
    assert main([*words, "--resume"]) == 0
    assert main(["fold", str(out), "--out", str(tmp_path / "folded")]) == 0


BAD_ROWS = {
    "a label outside the vocabulary": (
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 999]},
        "example 2 holds the label 999; the model knows 0 to",
    ),
    "a label that is no token": (
        {"input_ids": [1, 2, 3], "labels": [-100, 2, -1]},
        "labels holds -1, which is not a token",
    ),
    "a token of more than 32 bits": (
        {"input_ids": [1, 3000000000]},
        "input_ids holds 3000000000, which is not a token",
    ),
    "nothing to read": ({"text": ""}, "the text holds no token"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_data_are_refused_before_anything_is_written(
    model_folder: Path, tmp_path: Path, capsys: Capture, kind: str
) -> None:
    row, message = BAD_ROWS[kind]
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "red green"}\n' + json.dumps(row), "utf-8")
    words = ["finetune", str(model_folder), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*words, "--data-cache", str(tmp_path / "cache")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_packed_is_refused_before_anything_is_written(
    encoder_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the film is so"}\n' * 4, "utf-8")
    words = ["finetune", str(encoder_folder), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*words, "--batches", "packed"]) == 2
    assert "not a language model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_and_a_model_that_generates_are_refused_before_it_is_loaded(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """By the first row and `config.json`: there are no weights here that could be loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    data = reviews(tmp_path / "data.jsonl", 4, 0)
    words = ["finetune", str(folder), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "texts with labels, and the model generates text" in shown
    assert "--task language" in shown
    assert main(["finetune", "a.module:factory", *words[2:]]) == 2
    assert "only a model from a Hugging Face folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_table_with_names_of_its_own_is_learned(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """And what was read of it is said: forms, labels that are not learned, how many were cut."""
    table, out = tmp_path / "data.csv", tmp_path / "run"
    table.write_text("q,a\n" + "red is a, colour\n" * 6, "utf-8")
    words = ["finetune", str(model_folder), "--steps", "1", "--batch-size", "2", "--rank", "2"]
    mapped = [*words, "--data", str(table), "--out", str(out)]
    assert main(mapped) == 2
    assert "none of the known forms, but the fields ['q', 'a']" in capsys.readouterr().err
    assert not out.exists()
    assert main([*mapped, "--map", "prompt=q,completion=a"]) == 0
    assert "prompt and completion (6)" in " ".join(capsys.readouterr().out.split())
    assert record(out)["reading"]["map"] == {"prompt": "q", "completion": "a"}
    assert main([*mapped, "--map", "prompt=q", "--resume"]) == 2
    assert main([*mapped, "--map", "question=q"]) == 2
    assert "no form has a field 'question'" in " ".join(capsys.readouterr().err.split())
    labelled = reviews(tmp_path / "labelled.jsonl", 4, 0)
    given = [*words, "--data", str(labelled), "--task", "language", "--out", str(tmp_path / "b")]
    assert main(given) == 0
    assert "4 of 4 labels are not learned" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_many_rows_are_trained_on_from_their_file(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any
) -> None:
    words = ["finetune", str(model_folder), "--data", str(data_file), "--steps", "4", "--rank", "2"]
    words += ["--batch-size", "2", "--batches", "by-length", "--eval-data", str(data_file)]
    assert main([*words, "--out", str(tmp_path / "inside")]) == 0
    monkeypatch.setattr("qalora_compile.training.data.lazy_rows._FEW_ROWS", 0)
    assert main([*words, "--out", str(tmp_path / "outside")]) == 0
    assert "6 rows are checked, and tokenized during" in " ".join(capsys.readouterr().err.split())
    inside, outside = (record(tmp_path / name)["held_out"] for name in ("inside", "outside"))
    assert inside == outside

"""`eval` on all forms of one model, in one table, and on classifiers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.cli.main import main
from tests.cli.tiny import BAD, FILLER, GOOD

Capture = pytest.CaptureFixture[str]
TRAIN = ["--steps", "40", "--lr", "1e-2", "--rank", "4", "--batch-size", "6", "--group-size", "16"]


@pytest.fixture(scope="module")
def workspace(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run, its folded form and two exports."""
    root = tmp_path_factory.mktemp("eval")
    run, folded = str(root / "run"), str(root / "folded")
    words = ["finetune", str(model_folder), "--data", str(data_file), "--eval-data", str(data_file)]
    assert main([*words, "--out", run, *TRAIN]) == 0
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", str(root / "edge")]) == 0
    assert main(["export", folded, "--out", str(root / "all"), "--all-logits"]) == 0
    return root


def evaluated(capsys: Capture, *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["eval", *words, "--json"]) == 0
    return list(json.loads(capsys.readouterr().out))


@pytest.mark.slow
def test_every_form_has_the_figures_of_the_training(
    workspace: Path, model_folder: Path, data_file: Path, capsys: Capture
) -> None:
    forms = [str(model_folder), *(str(workspace / n) for n in ("run", "folded", "edge", "all"))]
    rows = evaluated(capsys, *forms, "--data", str(data_file))
    assert [row["form"] for row in rows] == ["float", "run", "folded", "edge", "edge"]
    held_out = json.loads((workspace / "run" / "run.json").read_text("utf-8"))["held_out"]["after"]
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(held_out["loss"], rel=1e-3)
        assert row["exact_match"] == held_out["exact_match"]
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert rows[0]["loss"] > 2 * rows[1]["loss"]
    assert {row["examples"] for row in rows} == {6}


def test_perplexity_of_texts_is_that_of_transformers(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["red is a colour", "one two three", "blue"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    (row,) = evaluated(capsys, str(model_folder), "--data", str(data), "--limit", "2")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, count = 0.0, 0
    for text in texts[:2]:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)
    assert (row["predicted"], row["examples"], row["exact_match"]) == (count, 2, None)


@pytest.mark.slow
def test_the_table_names_models_and_figures(
    workspace: Path, data_file: Path, capsys: Capture
) -> None:
    assert main(["eval", str(workspace / "edge"), "--data", str(data_file)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("perplexity", "exact match", "eval: 6 examples", "edge"))


@pytest.mark.slow
def test_a_classifier_has_an_accuracy(
    encoder_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = tmp_path / "reviews.jsonl"
    rows = [
        {"text": f"{filler} {word}", "label": label}
        for label, words in (("good", GOOD), ("bad", BAD))
        for word in words
        for filler in FILLER[:2]
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run, folded, edge = (str(tmp_path / name) for name in ("run", "folded", "edge"))
    sizes = ["--group-size", "8", "--rank", "2", "--batch-size", "6", "--lr", "1e-2"]
    words = ["finetune", str(encoder_folder), "--data", str(data), "--out", run, *sizes]
    assert main([*words, "--steps", "40", "--eval-data", str(data)]) == 0
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge]) == 0
    found = evaluated(capsys, run, folded, edge, "--data", str(data))
    held_out = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["held_out"]["after"]
    assert [row["accuracy"] for row in found] == [held_out["exact_match"]] * 3
    assert all("perplexity" not in row and row["predicted"] == 12 for row in found)
    assert main(["eval", str(encoder_folder), "--data", str(data)]) == 2
    assert "has no classes" in capsys.readouterr().err


def test_labelled_texts_have_a_perplexity_when_asked(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = tmp_path / "labelled.jsonl"
    data.write_text('{"text": "red is a colour", "label": "x"}\n', "utf-8")
    assert main(["eval", str(model_folder), "--data", str(data)]) == 2
    assert "--task language" in capsys.readouterr().err
    (row,) = evaluated(capsys, str(model_folder), "--data", str(data), "--task", "language")
    assert row["perplexity"] > 1


def test_different_tokenizers_are_pointed_out(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    import shutil

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    letters = {letter: index for index, letter in enumerate(["<unk>", "<end>", *"redisa "])}
    characters = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(other)
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "red is a"}\n', "utf-8")
    assert main(["eval", str(model_folder), str(other), "--data", str(data)]) == 0
    assert "tokenizers differ" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/none", "--data", "{data}"], "there is no model"),
        (["{root}/edge", "--data", "{root}/none.jsonl"], "none.jsonl"),
        (["{root}/edge", "--data", "{data}", "--limit", "0"], "--limit is 0"),
    ],
)
def test_bad_input_is_explained(
    workspace: Path, data_file: Path, words: list[str], message: str, capsys: Capture
) -> None:
    filled = [word.format(root=workspace, data=data_file) for word in words]
    assert main(["eval", *filled]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown

"""Every output ends a text where the model, its tokenizer or its training does (case 13, 15)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.cli.main import main
from tests.cli.tiny import WORDS, write_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' <turn> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def change(path: Path, **values: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on chats whose turns end in `<turn>`, of a model whose files name other ends."""
    root = tmp_path_factory.mktemp("ends")
    model = write_model(root / "model")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = tokenizer.backend_tokenizer
    # the vocabulary of the model is full: a word of it becomes the end of a turn
    state = json.loads(vocabulary.to_str())
    words = state["model"]["vocab"]
    words["<turn>"] = words.pop(":")
    text = json.dumps(state)
    (model / "tokenizer.json").write_text(text, "utf-8")
    change(
        model / "tokenizer_config.json",
        chat_template=TEMPLATE,
        additional_special_tokens=["<turn>"],
    )
    change(model / "config.json", eos_token_id=0)
    change(model / "generation_config.json", eos_token_id=0)
    data = root / "train.jsonl"
    turns = [
        [{"role": "user", "content": f"{word} is a"}, {"role": "assistant", "content": kind}]
        for word, kind in zip(WORDS[:6], ["colour"] * 3 + ["number"] * 3, strict=True)
    ]
    data.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns), "utf-8")
    words_ = ["finetune", str(model), "--data", str(data), "--steps", "1", "--batch-size", "2"]
    assert main([*words_, "--out", str(root / "run")]) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    assert main(["export", str(root / "folded"), "--out", str(root / "edge")]) == 0
    return root


TURN = len(WORDS) + 1
"""The place of `:`, the last word."""
ENDS = [0, 1, TURN]


@pytest.mark.slow
def test_a_run_says_where_each_end_is_from(run: Path) -> None:
    said = read(run / "run" / "run.json")["ends"]
    assert said == {
        "0": ["generation_config.json", "config.json"],
        "1": ["tokenizer"],
        str(TURN): ["training"],
    }
    assert read(run / "folded" / "run.json")["ends"] == said
    assert read(run / "run" / "model" / "generation_config.json")["eos_token_id"] == ENDS


def test_an_edge_folder_ends_at_all_of_them(run: Path) -> None:
    record = read(run / "edge" / "qalora.json")
    assert record["end_tokens"] == ENDS
    assert record["end_tokens_from"][str(TURN)] == ["training"]
    assert read(run / "edge" / "genai_config.json")["model"]["eos_token_id"] == ENDS


def test_a_float_folder_ends_at_all_of_them(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "float"
    assert main(["export", str(run / "folded"), "--out", str(out), "--target", "float"]) == 0
    assert read(out / "generation_config.json")["eos_token_id"] == ENDS


@pytest.mark.slow
def test_a_folder_that_was_only_quantized_asks_the_tokenizer_too(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "edge"
    assert main(["quantize", str(run / "model"), "--out", str(out)]) == 0
    assert read(out / "qalora.json")["end_tokens"] == [0, 1]
    assert read(out / "genai_config.json")["model"]["eos_token_id"] == [0, 1]


def test_a_prompt_has_no_end_behind_it(run: Path, tmp_path: Path) -> None:
    """Where a tokenizer writes one itself, it stood between the prompt and the answer."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    from qalora_compile.training.data.tokenize import prompt_tokens

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <end>", special_tokens=[("<unk>", 0), ("<end>", 1)]
    )
    assert tokenizer("red is").input_ids == [0, 2, 8, 1]
    assert prompt_tokens(tokenizer, "red is") == [0, 2, 8]
    assert prompt_tokens(tokenizer, "") == [0]

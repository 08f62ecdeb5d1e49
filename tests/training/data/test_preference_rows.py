"""Rows with a preferred and a rejected answer: each answer is read as a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.training import load_examples
from qalora_compile.training.data.example import IGNORED
from qalora_compile.training.data.lazy_rows import RowIndex
from qalora_compile.training.data.parse_line import LineReader
from qalora_compile.training.data.row_forms import answers_of, fields_of, read_mapping, recognise
from qalora_compile.untrusted.tokenizer import load_tokenizer
from tests.cli.tiny import write_model

USER = {"role": "user", "content": "red is a"}
GOOD = {"role": "assistant", "content": "colour"}
BAD = {"role": "assistant", "content": "number"}
TEXTS = {"prompt": "red is a", "chosen": " colour", "rejected": " number two"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} <end> {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_model(tmp_path_factory.mktemp("model")))


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_each_answer_is_read_as_a_completion(tokenizer: Any) -> None:
    reader = LineReader(tokenizer=tokenizer, max_length=32, pairs=True)
    plain = LineReader(tokenizer=tokenizer, max_length=32)
    found = reader.read(TEXTS, "here")
    chosen, rejected = found.example.answers
    assert found.form == "prompt, chosen and rejected"
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        row = {"prompt": TEXTS["prompt"], "completion": TEXTS[name]}
        assert answer == plain.read(row, "here").example
    assert chosen.labels[:3] == (IGNORED,) * 3
    assert (len(chosen.tokens), len(rejected.tokens)) == (5, 6)
    assert found.example.length == 6


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "red is a", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": []},
    ],
    ids=["prompt of messages", "complete chats", "complete chats with the prompt as a text"],
)
def test_answers_may_be_messages(row: dict[str, Any], tokenizer: Any) -> None:
    chosen, rejected = answers_of(row, "here")
    assert chosen == {"prompt": [USER], "completion": [GOOD]}
    assert rejected == {"prompt": [USER], "completion": [BAD]}
    tokenizer.chat_template = TEMPLATE
    try:
        reader = LineReader(tokenizer=tokenizer, max_length=32, pairs=True)
        example = reader.read(row, "here").example
    finally:
        tokenizer.chat_template = None
    words = [tokenizer.decode([t for t in e.labels if t != IGNORED]) for e in example.answers]
    assert [word.split()[0] for word in words] == ["colour", "number"]


def test_tools_belong_to_both_answers() -> None:
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": [{"name": "f"}]}
    assert all(each["tools"] == [{"name": "f"}] for each in answers_of(row, "here"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "no prompt with two answers"),
        ({"chosen": "b", "rejected": "c"}, "no prompt with two answers"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "no prompt with two answers"),
        ({"prompt": "a", "completion": "b"}, "no prompt with two answers"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "preferred answer is the rejected one"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "begins with the assistant"),
        ({"prompt": [USER], "chosen": ["x"], "rejected": [BAD]}, "must be a list of {role"),
    ],
    ids=str,
)
def test_malformed_rows_are_refused(row: dict[str, Any], said: str, tokenizer: Any) -> None:
    reader = LineReader(tokenizer=tokenizer, max_length=32, pairs=True)
    for read in (reader.read, reader.check):
        with pytest.raises(UserInputError, match=said) as caught:
            read(row, "data:3")
        assert caught.value.where == "data:3"


def test_without_a_loss_of_pairs_the_options_are_named() -> None:
    with pytest.raises(UserInputError, match="answers to choose from are not learned") as caught:
        recognise(fields_of(TEXTS, None, "here"), "here")
    assert "--loss dpo or orpo" in str(caught.value.hint)


def test_fields_may_have_other_names(tokenizer: Any) -> None:
    mapping = read_mapping("prompt=q,chosen=good,rejected=bad")
    reader = LineReader(tokenizer=tokenizer, max_length=32, pairs=True, mapping=mapping)
    row = {"q": TEXTS["prompt"], "good": TEXTS["chosen"], "bad": TEXTS["rejected"]}
    expected = LineReader(tokenizer=tokenizer, max_length=32, pairs=True).read(TEXTS, "here")
    assert reader.read(row, "here") == expected


def test_files_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    long = TEXTS | {"rejected": " number" * 9}
    empty = TEXTS | {"rejected": ""}
    path = written(tmp_path / "data.jsonl", TEXTS, long, empty)
    data = load_examples(path, tokenizer, max_length=8, pairs=True)
    assert (len(data.examples), data.truncated, data.skipped) == (2, 1, 1)
    largest = max(max(e.tokens) for each in data.examples for e in each.answers)
    assert data.token_range[1] == largest
    assert data.examples[1].length == 8


def test_large_data_are_read_during_training(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "data.jsonl", *[TEXTS] * 3)
    at_once = load_examples(path, tokenizer, max_length=8, pairs=True)
    monkeypatch.setattr(RowIndex, "few", lambda self, limit: False)
    lazy = load_examples(path, tokenizer, max_length=8, pairs=True)
    assert lazy.is_lazy
    assert list(lazy.examples) == list(at_once.examples)


def test_settings_that_do_not_suit_pairs_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", TEXTS)
    with pytest.raises(UserInputError, match="compares answers alone"):
        load_examples(path, tokenizer, max_length=8, pairs=True, learn="everything")
    with pytest.raises(UserInputError, match="holds no pairs of answers"):
        load_examples(path, tokenizer, max_length=8, pairs=True, cache=tmp_path / "cache")

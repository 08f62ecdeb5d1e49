"""Many rows, and long ones: read when they are needed, cut before they are tokenized."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.training import Batches, Packed, load_examples
from qalora_compile.training.data import lazy_rows
from qalora_compile.training.data.dataset import taught_ends
from qalora_compile.training.data.parse_line import LineReader
from tests.fuzz.seeds import tokenizer as small_tokenizer
from tests.training.data.test_dataset import LABELLED, Truncating, Words, write
from tests.training.data.test_read_rows import KINDS as FILES
from tests.training.test_completions import KINDS, tokenizer

ROWS = [
    {"text": "a bb ccc " * 3},
    {"prompt": "a", "completion": " "},
    {"prompt": "a bb", "completion": " ccc"},
    {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]},
    {"input_ids": [1, 2, 3]},
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of any size count as large."""
    monkeypatch.setattr(lazy_rows, "_FEW_ROWS", 0)


@pytest.mark.usefixtures("few")
def test_the_examples_are_those_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, second = write(tmp_path / "a.jsonl", *ROWS), write(tmp_path / "b.jsonl", ROWS[0])
    data = load_examples([path, second], Words(), max_length=6)
    monkeypatch.undo()
    inside = load_examples([path, second], Words(), max_length=6)
    assert data.is_lazy and not inside.is_lazy
    assert tuple(data.examples) == inside.examples
    assert (data.files, data.token_range) == (inside.files, inside.token_range)
    assert (data.truncated, data.skipped, data.looked_at) == (2, 2, 4)
    assert list(Packed(data.examples, 12)) == list(Packed(inside.examples, 12))
    for by_length in (False, True):
        one, other = (
            Batches(each.examples, batch_size=2, seed=3, by_length=by_length).at(5)
            for each in (data, inside)
        )
        assert one.input_ids.equal(other.input_ids) and one.labels.equal(other.labels)
    assert taught_ends(data, None) == taught_ends(inside, None)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("make", FILES)
def test_rows_of_every_kind_of_file_can_be_read_alone(make: Any, tmp_path: Path) -> None:
    given = make(tmp_path)
    data = load_examples(given, Words(), max_length=50)
    assert len(data.examples) == 5
    assert data.examples[3] == list(data.examples)[3] == tuple(data.examples)[-2]
    assert data.examples[3].tokens[:4] == (1, 2, 2, 2)


@pytest.mark.usefixtures("few")
def test_every_row_is_checked_before_training(tmp_path: Path) -> None:
    good = [{"text": "a bb"}] * 3
    bad: Any
    for bad in ("{", {"question": "?"}, {"text": 3}, {"input_ids": [True]}, {"messages": []}):
        path = write(tmp_path / "a.jsonl", *good, bad)
        with pytest.raises(UserInputError) as caught:
            load_examples(path, Words(), max_length=8)
        assert caught.value.where == f"{path}:4"
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": ""})
    with pytest.raises(UserInputError, match="no usable example"):
        load_examples(path, Words(), max_length=8)
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"text": "a"})
    with pytest.raises(UserInputError, match="learns text from text"):
        load_examples(path, Words(), max_length=8, decoder_start=7)
    path = write(tmp_path / "a.jsonl", *LABELLED, {"text": "a", "label": "ugly"})
    with pytest.raises(UserInputError, match="'ugly' does not occur"):
        load_examples(path, Truncating(), max_length=8, classes=("bad", "good"))


def test_what_only_tokens_show_is_said_when_it_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_rows, "_FEW_ROWS", 0)
    monkeypatch.setattr("qalora_compile.training.data.load_examples.LOOKED_AT", 1)
    monkeypatch.setattr("qalora_compile.training.data.load_examples._LEAST_LOOKED_AT", 1)
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b" * 500}, {"text": " "})
    data = load_examples(path, Words(), max_length=8)
    data.check_tokens(100)
    assert data.examples[0].tokens == (1, 99)
    with pytest.raises(UserInputError, match=r"a\.jsonl:2 holds the token 500; the model knows"):
        data.examples[1]
    with pytest.raises(UserInputError, match="the text holds no token") as caught:
        data.examples[2]
    assert caught.value.where == f"{path}:3"


LONG = "Answer: 4 The colours are red, green and blue; über Straße, naïve café two  spaces\n" * 700
FORMS: dict[str, Any] = {
    "text": {"text": LONG},
    "long prompt": {"prompt": LONG, "completion": " 4"},
    "long completion": {"prompt": "Answer:", "completion": LONG},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_before_it_is_tokenized(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has the tokens that it has where all of it is tokenized."""
    reader = LineReader(tokenizer=tokenizer(kind), max_length=24)
    short = reader.read(FORMS[form], "here")
    monkeypatch.setattr("qalora_compile.training.data.tokenize._LEAST_CHARACTERS", 10**9)
    uncut = LineReader(tokenizer=tokenizer(kind), max_length=24).read(FORMS[form], "here")
    assert short == uncut
    assert short.cut and short.example.length == 24


def test_a_text_of_few_tokens_is_not_cut_short() -> None:
    """Long tokens, or none in its beginning: more of it is looked at."""
    reader = LineReader(tokenizer=Words(), max_length=8)
    found = reader.read({"text": " " * 50_000 + "a " * 20 + "bb " * 50_000}, "here").example
    assert found.tokens == (1,) * 8
    assert reader.read({"text": "b" * 200_000}, "here").example.tokens == (200_000, 99)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "red is a colour " * 3_300_000},
        {"prompt": "red is a colour " * 3_300_000, "completion": " blue"},
        {"messages": [{"role": "user", "content": "red is a " * 5_600_000}]},
    ],
    ids=["text", "pair", "chat"],
)
def test_a_line_of_fifty_megabytes_is_read_at_once(row: dict[str, Any], tmp_path: Path) -> None:
    if "messages" in row:
        row["messages"].append({"role": "assistant", "content": "blue"})
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    words = small_tokenizer()
    begin = time.monotonic()
    data = load_examples(path, words, max_length=32)
    assert time.monotonic() - begin < 12  # all of it would take a minute, and 5 GB
    assert (data.examples[0].length, data.truncated) == (32, 1)


PROGRAM = """
import sys, time
from qalora_compile.training import Batches, load_examples
from tests.fuzz.seeds import tokenizer

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

words = tokenizer()
load_examples(sys.argv[1], words, max_length=64)
before, begin = resident(), time.monotonic()
data = load_examples(sys.argv[2], words, max_length=64)
batches = Batches(data.examples, batch_size=8, seed=0)
tokens = sum(batches.at(step).tokens for step in range(20))
print(time.monotonic() - begin, resident() - before, len(data.examples), tokens)
"""


@pytest.mark.slow
def test_a_million_lines_start_at_once(tmp_path: Path) -> None:
    """Within 400 MB and 10 s more than ten lines: 36 MB and 5 s of one core here."""
    line = json.dumps({"prompt": "red is a number: one two three, or", "completion": " a colour"})
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text(f"{line}\n" * 10, "utf-8")
    many.write_text(f"{line}\n" * 1_000_000, "utf-8")
    command = [sys.executable, "-c", PROGRAM, str(few), str(many)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes, count, tokens = map(float, done.stdout.split())
    assert (count, tokens) == (1_000_000, 20 * 8 * 11)
    assert seconds < 20 and megabytes < 400, done.stdout  # the machine may be busy

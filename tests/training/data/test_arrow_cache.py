"""Data on disk: the same examples, tokenized once, in memory that does not grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training import Batches, Packed, load_examples
from qalora_compile.training.data.arrow_cache import COUNTS_FILE
from qalora_compile.training.data.read_rows import find_files
from tests.training.data.test_dataset import LABELLED, Truncating, Words, write

pytest.importorskip("datasets")


class Known(Words):
    """A tokenizer that can say what its tokens depend on."""

    vocabulary = 1

    def get_vocab(self) -> dict[str, int]:
        return {"a": self.vocabulary}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [{"text": "a bb ccc " * (i % 7 + 1)} for i in range(40)]
    return write(tmp_path / "data.jsonl", *rows, {"prompt": "a", "completion": ""})


def test_the_examples_are_those_of_memory(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    inside = load_examples(path, Known(), max_length=12)
    outside = load_examples(path, Known(), max_length=12, cache=cache)
    assert tuple(outside.examples) == inside.examples
    assert outside.examples[3] == inside.examples[3]
    assert outside.examples[-2:] == list(inside.examples[-2:])
    assert (outside.files, outside.token_range) == (inside.files, inside.token_range)
    assert len(outside.examples) == 40
    with pytest.raises(IndexError):
        outside.examples[40]
    for by_length in (False, True):
        one, other = (
            Batches(data.examples, batch_size=4, seed=2, by_length=by_length).at(13)
            for data in (inside, outside)
        )
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
    assert list(Packed(inside.examples, 24)) == list(Packed(outside.examples, 24))


def test_pairs_and_classes_go_through_too(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "a bb", "completion": "ccc"})
    options = {"max_length": 9, "decoder_start": 7}
    inside, outside = (
        load_examples(pairs, Known(), **options, cache=cache)  # type: ignore[arg-type]
        for cache in (None, tmp_path / "cache")
    )
    assert tuple(outside.examples) == inside.examples

    class Labels(Known, Truncating):
        pass

    file, classes = write(tmp_path / "labels.jsonl", *LABELLED), ("bad", "good")
    inside, outside = (
        load_examples(file, Labels(), max_length=9, classes=classes, cache=cache)
        for cache in (None, tmp_path / "cache")
    )
    assert tuple(outside.examples) == inside.examples
    assert outside.classes == classes


def test_what_was_tokenized_is_not_tokenized_again(path: Path, tmp_path: Path) -> None:
    cache, calls = tmp_path / "cache", []

    class Counting(Known):
        def __call__(self, text: str, add_special_tokens: bool = True) -> object:
            calls.append(text)
            return super().__call__(text)

    def load(tokenizer: Words, max_length: int = 12, learn: str = "completions") -> int:
        before = len(calls)
        load_examples(path, tokenizer, max_length=max_length, learn=learn, cache=cache)
        return len(calls) - before

    other = Counting()
    other.vocabulary = 2
    assert load(Counting()) == 44
    assert load(Counting()) == 0
    assert load(Counting(), max_length=11) == 44
    assert load(Counting(), learn="everything") == 44
    assert load(other) == 44
    path.write_text(path.read_text("utf-8") + '\n{"text": "a bb"}', "utf-8")
    assert load(Counting()) == 45
    assert len(list(cache.glob(f"*/{COUNTS_FILE}"))) == 5


def test_a_bad_line_leaves_nothing_behind(path: Path, tmp_path: Path) -> None:
    path.write_text(path.read_text("utf-8") + "\n{", "utf-8")
    with pytest.raises(UserInputError, match="not valid JSON"):
        load_examples(path, Known(), max_length=12, cache=tmp_path / "cache")
    assert not [f for f in (tmp_path / "cache").iterdir() if f.is_dir()]
    with pytest.raises(UserInputError, match="cannot read"):
        load_examples(tmp_path / "none", Known(), max_length=12, cache=tmp_path / "cache")
    assert find_files(path) == (path,)


@pytest.mark.parametrize("field", ["input_ids", "labels"])
def test_a_token_that_the_cache_cannot_hold_is_reported_with_its_line(
    tmp_path: Path, field: str
) -> None:
    good = {"input_ids": [1, 2**31 - 1], "labels": [-100, 2**31 - 1]}
    path, cache = write(tmp_path / "data.jsonl", good), tmp_path / "cache"
    data = load_examples(path, None, max_length=8, cache=cache)
    assert data.examples[0].tokens == (1, 2**31 - 1)
    write(path, good, good | {field: [1, 2**31]})
    with pytest.raises(UserInputError, match=f"{field} holds 2147483648") as caught:
        load_examples(path, None, max_length=8, cache=cache)
    assert str(caught.value.where).endswith("data.jsonl:2")


def test_without_the_library_small_files_still_work(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_examples(path, Known(), max_length=12).examples) == 40
    with pytest.raises(UnsupportedError, match="datasets is needed") as caught:
        load_examples(path, Known(), max_length=12, cache=tmp_path / "cache")
    assert "qalora-compile[train]" in str(caught.value.hint)


PROGRAM = """
import resource, sys
import datasets, torch
from qalora_compile.training import Batches, load_examples

path, cache = sys.argv[1], sys.argv[2] or None
torch.ones(64) @ torch.ones(64, 64)  # what torch keeps for itself
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
limit = (used + 64 * 1024) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
data = load_examples(path, None, max_length=256, cache=cache)
batches = Batches(data.examples, batch_size=4, seed=0, by_length=True)
print(sum(batches.at(step).tokens for step in range(0, 2000, 50)))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Within 64 MB more than an idle process has: from disk it works, in memory it cannot."""
    path = tmp_path / "data.jsonl"
    line = json.dumps({"input_ids": list(range(1000, 1256))}) + "\n"
    path.write_text(line * 12_000, "utf-8")

    def run(cache: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(path), cache]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("").stderr.strip().endswith("MemoryError")
    done = run(str(tmp_path / "cache"))
    assert (done.returncode, done.stdout.strip()) == (0, str(40 * 4 * 256)), done.stderr
    arrow = next((tmp_path / "cache").glob("*/examples.arrow"))
    assert arrow.stat().st_size > 20e6

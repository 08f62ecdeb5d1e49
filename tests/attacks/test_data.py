"""Hostile data files: lines of JSON."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.load_examples import find_classes, load_examples
from qalora_compile.training.data.read_rows import read_rows
from tests.attacks.support import attack, refused
from tests.fuzz.seeds import tokenizer

LINES: dict[str, bytes] = {
    "nested 100,000 deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an integer of 5,000 digits": b'{"input_ids": [' + b"9" * 5000 + b"]}",
    "a token of 2**63": b'{"input_ids": [1, 9223372036854775808]}',
    "a negative token": b'{"input_ids": [1, -5]}',
    "a token that is NaN": b'{"input_ids": [1, NaN]}',
    "a token that is infinite": b'{"input_ids": [1, 1e999]}',
    "a key twice": b'{"text": "red", "text": "blue"}',
    "half of a surrogate pair": b'{"text": "\\ud800"}',
    "no UTF-8": b'{"text": "\xff"}',
    "no object": b"[1]",
    "text that is a number": b'{"text": 7}',
    "messages that are a text": b'{"messages": "red"}',
    "a role that is an object": b'{"messages": [{"role": {"a": 1}, "content": "x"}]}',
    "no JSON": b"{",
    "no bytes": b"",
    "a NUL": b"\0",
}


def read(path: Path) -> Callable[[], Any]:
    words = tokenizer()
    return lambda: len(load_examples(path, words, max_length=16).examples)


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_is_none_is_refused_with_its_number(kind: str, folder: Path) -> None:
    """Depth, digits, numbers that are none, and keys that readers disagree about."""
    path = folder / "train.jsonl"
    path.write_bytes(b'{"text": "red is"}\n' + LINES[kind] + b"\n")
    if kind == "no bytes":
        assert attack(read(path), folder).value == 1
    else:
        refused(read(path), folder, "train.jsonl:2")
    attack(lambda: find_classes(path), folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    """Reading a pipe never ends."""
    path = folder / "train.jsonl"
    os.mkfifo(path)
    refused(read(path), folder, "not a regular file")


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    """Data that are a folder."""
    refused(read(folder), folder)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_offsets_that_lead_out_of_the_memory(kind: str, folder: Path) -> None:
    """A column of texts, one of which begins beyond the file: reading it would end the process."""
    pa = pytest.importorskip("pyarrow")
    batch = pa.RecordBatch.from_pydict({"text": ["red is", "a colour"]})
    path = folder / "train.arrow"
    made = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
    with pa.OSFile(str(path), "wb") as file, made(file, batch.schema) as writer:
        writer.write_batch(batch)
    before, after = (
        b"".join(n.to_bytes(4, "little") for n in offsets)
        for offsets in ((0, 6, 14), (0, 1 << 30, (1 << 30) + 8))
    )
    assert path.read_bytes().count(before) == 1
    path.write_bytes(path.read_bytes().replace(before, after))
    refused(lambda: len(list(read_rows(path))), folder, "train.arrow:1", "cannot read")


def test_a_row_that_a_compressed_file_never_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes of nothing, which are megabytes."""
    path = folder / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (3 << 20)))
    monkeypatch.setattr("qalora_compile.training.data.read_rows.MAX_JSON_BYTES", 2 << 20)
    with pytest.raises(UserInputError, match="the line has more than 2 MiB"):
        load_examples(path, tokenizer(), max_length=16)

"""JSON of strangers is read within limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import (
    read_json,
    read_object,
)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe"])
def test_bad_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match="not valid JSON"):
        read_json(path)


def test_missing_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 200 deep"),
        (b'{"a":' * 201 + b"1" + b"}" * 201, "nested more than 200 deep"),
        (b'{"n": ' + b"9" * 5000 + b"}", "integer has 5000 digits"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (rb'{"a": "\ud800"}', "surrogate"),
        (rb'["\udfff"]', "surrogate"),
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match=match):
        read_json(path)


def test_what_real_files_hold_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    brackets = '["' + "[{" * 500 + '\\""]'
    path.write_text(f'{{"model_max_length": {10**30}, "text": {brackets}, "e": "\\ud83d\\ude00"}}')
    assert read_json(path) == {
        "model_max_length": 10**30,
        "text": ["[{" * 500 + '"'],
        "e": "\N{GRINNING FACE}",
    }


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserInputError, match="no JSON object"):
        read_object(tmp_path / "a.json")

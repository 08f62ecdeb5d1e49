"""What others wrote is read within limits, and never outside its folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import (
    check_fields,
    check_folder,
    member,
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
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
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


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    for name in ("a.json", "b.json"):
        with pytest.raises(UserInputError, match="no regular file"):
            read_json(tmp_path / name)
    with pytest.raises(UserInputError, match="no regular file"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../a", "x/../../a", "/etc/passwd", "C:\\a", "\\\\host\\a", "..\\a", "", None, 3, "a\0b"],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "a").write_text("secret")
    inner = tmp_path / "inner"
    (inner / "x").mkdir(parents=True)
    with pytest.raises(UserInputError, match="leads out of the folder|no name of a file"):
        member(inner, name)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("secret")
    inner = tmp_path / "inner"
    inner.mkdir()
    for name, make in (("soft", os.symlink), ("hard", os.link)):
        make(outside, inner / name)
        with pytest.raises(UserInputError, match="outside the folder|leads out of the folder"):
            member(inner, name)
        with pytest.raises(UserInputError, match=name):
            check_folder(inner)
        (inner / name).unlink()
    os.symlink(inner / "nothing", inner / "loose")
    with pytest.raises(UserInputError, match="link to nothing"):
        check_folder(inner)


def test_links_inside_a_folder_and_the_hubs_cache_are_taken(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    (model / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    (model / "blobs" / "abc").write_text("weights")
    os.symlink("../../blobs/abc", snapshot / "model.safetensors")
    os.symlink("../../../blobs/abc", snapshot / "sub" / "again")
    (snapshot / "config.json").write_text("{}")
    os.symlink("config.json", snapshot / "same")
    os.link(snapshot / "config.json", snapshot / "hard")
    check_folder(snapshot)
    assert member(snapshot, "model.safetensors").read_text() == "weights"
    assert member(snapshot, "sub/again").read_text() == "weights"
    os.symlink(tmp_path / "models--a--b" / "blobs", snapshot / "blobs")
    with pytest.raises(UserInputError, match="leads out"):
        check_folder(snapshot)


def test_a_name_that_is_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a..b").write_text("1")
    assert member(tmp_path, "x/a..b") == tmp_path / "x" / "a..b"
    with pytest.raises(UserInputError, match="missing"):
        member(tmp_path, "x/b")


@dataclass(frozen=True)
class Row:
    """What a record may hold."""

    name: str
    size: int | None
    shape: tuple[int | str, ...] = ()
    flag: bool = False


def test_fields_are_compared_with_a_dataclass() -> None:
    given = {"name": "a", "size": None, "shape": [1, "batch"]}
    assert Row(**check_fields(Row, given, "a row")) == Row("a", None, (1, "batch"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"name": 1}, {"size": True}, {"size": 1.5}, {"shape": "ab"}, {"shape": [None]}),
        *({"flag": 1}, {"other": 1}, {"flag": None}),
    ],
)
def test_fields_of_other_types_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a row"):
        check_fields(Row, {"name": "a", "size": 1} | changes, "a row")


@pytest.mark.parametrize("row", [None, [], {"name": "a"}])
def test_what_is_no_such_object_is_refused(row: object) -> None:
    with pytest.raises(ValueError, match="other fields"):
        check_fields(Row, row, "a row")

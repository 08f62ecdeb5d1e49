"""Files of strangers are never read outside their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import (
    check_folder,
    member,
    read_json,
)


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    for name in ("a.json", "b.json"):
        with pytest.raises(UserInputError, match="not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(UserInputError, match="not a regular file"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../a", "x/../../a", "/etc/passwd", "C:\\a", "\\\\host\\a", "..\\a", "", None, 3, "a\0b"],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "a").write_text("secret")
    inner = tmp_path / "inner"
    (inner / "x").mkdir(parents=True)
    with pytest.raises(UserInputError, match="leads out of the folder|not a file name"):
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

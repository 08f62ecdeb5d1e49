"""Outputs appear completely or not at all; malformed JSON is reported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_files, atomic_folder, check_output, write_json
from qalora_compile.files.marks import GENERATOR
from qalora_compile.untrusted import read_json

RUN = '{"format": "qalora-run", "version": 1}'
"""What says that a folder is ours."""


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(os.listdir(folder))


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1", "utf-8")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names(target) == ["a"]
    assert names(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_folder_does_not_appear_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1", "utf-8")
        raise RuntimeError("stop")
    assert names(tmp_path) == []


def test_an_existing_folder_is_kept_or_replaced_completely(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "run.json").write_text(RUN, "utf-8")
    with pytest.raises(UserInputError, match="already exists"), atomic_folder(target):
        pytest.fail("the block must not run")
    with pytest.raises(KeyError), atomic_folder(target, overwrite=True):
        raise KeyError
    assert names(target) == ["run.json"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("1", "utf-8")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "run.json").write_text(RUN, "utf-8")
    original, calls = os.rename, []

    def second_fails(source: Any, destination: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        original(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"), atomic_folder(target, overwrite=True):
        pass
    assert names(target) == ["run.json"]
    assert names(tmp_path) == ["out"]


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text(GENERATOR, "utf-8")
    folder.mkdir()
    with (
        pytest.raises(UserInputError, match="is not a folder"),
        atomic_folder(file, overwrite=True),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(UserInputError, match="is not a file"), atomic_files(folder, overwrite=True):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["file", "folder"]


def test_files_appear_together_the_main_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    original = os.replace

    def record(source: Any, destination: Any) -> None:
        moved.append(Path(destination).name)
        original(source, destination)

    monkeypatch.setattr(os, "replace", record)
    with atomic_files(tmp_path / "a.onnx") as scratch:
        scratch.write_text("main", "utf-8")
        scratch.with_name("a.onnx.data").write_text("data", "utf-8")
        scratch.with_name("z.json").write_text("{}", "utf-8")
        assert names(tmp_path) == [".a.onnx.qalora.lock", scratch.parent.name]
    assert names(tmp_path) == ["a.onnx", "a.onnx.data", "z.json"]
    assert moved[-1] == "a.onnx"


def test_files_do_not_appear_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), atomic_files(tmp_path / "a.onnx") as scratch:
        scratch.write_text("half", "utf-8")
        raise RuntimeError("stop")
    assert names(tmp_path) == []


def test_an_existing_file_is_kept_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text(f"old {GENERATOR}", "utf-8")
    with pytest.raises(UserInputError, match="already exists") as caught, atomic_files(path):
        pytest.fail("the block must not run")
    assert "overwrite=True" in str(caught.value)
    with pytest.raises(RuntimeError), atomic_files(path, overwrite=True) as scratch:
        scratch.write_text("half", "utf-8")
        raise RuntimeError
    assert path.read_text("utf-8") == f"old {GENERATOR}"
    with atomic_files(path, overwrite=True) as scratch:
        scratch.write_text("new", "utf-8")
    assert path.read_text("utf-8") == "new"
    assert names(tmp_path) == ["a.onnx"]


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserInputError, match="already exists"):
        check_output(link, overwrite=False)


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserInputError, match="is a file, not a folder"):
        check_output(tmp_path / "file" / "a" / "b", overwrite=True)


def test_json_is_stable_and_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None], "a": "ü"})
    first = path.read_bytes()
    assert first.index(b'"a"') < first.index(b'"b"')
    assert read_json(path) == {"a": "ü", "b": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_bytes() == first
    assert names(tmp_path) == ["a.json"]

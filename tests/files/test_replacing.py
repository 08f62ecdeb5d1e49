"""A process that is killed while it replaces an output loses nothing, and no rest of it stays."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_files, atomic_folder, check_output, recover, reserve
from qalora_compile.files.marks import GENERATOR
from qalora_compile.files.replacing import keep_parts
from tests.models import slow

RUN = '{"format": "qalora-run", "version": 1}'
CALLS = ("rename", "replace", "rmdir", "unlink", "fsync", "mkdir")
"""Every call of the system that changes or syncs something."""


def in_child(work: Callable[[], Any]) -> int:
    """Do something in a process of its own; gives how it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Kill a child before its call of that number; False: it had fewer."""

    def deadly() -> None:
        count = 0
        for name in CALLS:
            original = getattr(os, name)

            def call(*args: Any, original: Any = original, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            setattr(os, name, call)
        work()

    status = in_child(deadly)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def write_run(path: Path, text: str) -> None:
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "run.json").write_text(RUN, "utf-8")
        (folder / "a").write_text(text, "utf-8")


def write_model(path: Path, text: str, *, companion: bool = True) -> None:
    with atomic_files(path, overwrite=True) as scratch:
        scratch.write_text(f"{text} {GENERATOR}", "utf-8")
        if companion:
            scratch.with_name(f"{path.name}.data").write_text(text, "utf-8")


@pytest.mark.slow
def test_a_folder_is_the_old_one_or_the_new_one_wherever_its_writer_is_killed(
    tmp_path: Path,
) -> None:
    for number in range(1, 100):
        path = tmp_path / str(number) / "out"
        path.parent.mkdir()
        write_run(path, "old")
        landed = killed_at(number, partial(write_run, path, "new"))
        recover(path)
        assert (path / "a").read_text("utf-8") in ("old", "new")
        write_run(path, "newest")
        assert sorted(os.listdir(path)) == ["a", "run.json"]
        assert os.listdir(path.parent) == ["out"]
        if not landed:
            break
    assert 10 < number < 90


@pytest.mark.parametrize("old", ["both", *slow("one file", "nothing")])
def test_files_are_the_old_ones_or_the_new_ones_wherever_their_writer_is_killed(
    tmp_path: Path, old: str
) -> None:
    for number in range(1, 100):
        path = tmp_path / str(number) / "m.onnx"
        path.parent.mkdir()
        if old != "nothing":
            write_model(path, "old", companion=old == "both")
        before = {f.name: f.read_text("utf-8") for f in path.parent.iterdir()}
        landed = killed_at(number, partial(write_model, path, "new"))
        recover(path)
        found = {f.name: f.read_text("utf-8") for f in path.parent.iterdir() if f.name[0] != "."}
        assert found in (before, {"m.onnx": f"new {GENERATOR}", "m.onnx.data": "new"})
        write_model(path, "newest")
        assert sorted(os.listdir(path.parent)) == ["m.onnx", "m.onnx.data"]
        if not landed:
            break
    assert 10 < number < 90


def test_any_command_that_names_the_folder_puts_it_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    write_run(path, "old")
    path.rename(tmp_path / ".run.qalora.old")
    (tmp_path / ".run.qalora.tmp").mkdir()
    assert main(["fold", str(path), "--out", str(tmp_path / "folded")]) == 2
    assert "program.json" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]
    path.rename(tmp_path / ".run.qalora.old")
    with pytest.raises(UserInputError, match="already exists"):
        check_output(path, overwrite=False)


def test_what_a_living_process_moved_aside_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    (tmp_path / ".run.qalora.old").mkdir()
    with reserve(path, overwrite=False, go_on=True):
        status = in_child(lambda: recover(path))
        assert status == 0
        assert (tmp_path / ".run.qalora.old").is_dir()
    recover(path)
    assert os.listdir(tmp_path) == ["run"]


def test_leftovers_of_the_dead_are_removed_and_those_of_other_outputs_are_not(
    tmp_path: Path,
) -> None:
    dead = (".out.qalora.tmp", ".out.qalora.0123abc.part")
    others = (".out.v2.qalora.tmp", ".out.v2.qalora.0123abc.part", ".out.tmp", ".other.qalora.tmp")
    for name in (*dead, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("1", "utf-8")
    (tmp_path / ".out.qalora.lock").touch()
    write_run(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "out"])


def test_a_list_of_a_stranger_moves_nothing_elsewhere(tmp_path: Path) -> None:
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    aside = folder / ".m.onnx.qalora.files"
    aside.mkdir(parents=True)
    victim.write_text("mine", "utf-8")
    (folder / ".m.onnx.qalora.tmp").mkdir()
    text = '{"staging": ".m.onnx.qalora.tmp", "names": ["../victim", "m.onnx"]}'
    (aside / ".names.json").write_text(text, "utf-8")
    recover(folder / "m.onnx")
    assert victim.read_text("utf-8") == "mine"
    assert os.listdir(folder) == []


def test_paths_without_a_name_are_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for text in ("", ".", "/", "..", "x" * 5000, "a\0b"):
        recover(Path(text))
    assert os.listdir(tmp_path) == ["here"]
    assert os.listdir(tmp_path / "here") == []


def test_unfinished_outputs_in_folders_are_kept(tmp_path: Path) -> None:
    for name in ("a", "onnx/.m.onnx.qalora.key.part/m.onnx", "onnx/m.onnx", "other/deep/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "onnx")
    keep_parts(tmp_path)
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["onnx/.m.onnx.qalora.key.part/m.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]

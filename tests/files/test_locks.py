"""One writer an output, in all processes; no lock file stays, and removing one is no race."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, locks, reserve
from qalora_compile.files.locks import Lock, held, lock_of
from tests.files.test_replacing import in_child

BUSY = "another process is writing"


def test_a_second_process_is_refused_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second() -> None:
        started = time.monotonic()
        with pytest.raises(UserInputError, match=BUSY), reserve(out, overwrite=False):
            pass
        assert time.monotonic() - started < 2

    with reserve(out, overwrite=False):
        assert in_child(second) == 0
        with atomic_folder(out) as folder:
            (folder / "a").touch()
            assert in_child(second) == 0
        with pytest.raises(UserInputError, match="already exists"), atomic_folder(out):
            pass
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_two_in_one_process_are_refused_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    busy = pytest.raises(UserInputError, match=BUSY)
    with atomic_folder(out), busy, atomic_folder(out):
        pytest.fail("two write the same output")
    other = tmp_path / "other"
    twice = pytest.raises(UserInputError, match=BUSY)
    with reserve(other, overwrite=False), atomic_folder(other), twice, atomic_folder(other):
        pytest.fail("two write the same output")


def test_another_spelling_of_the_path_is_the_same_output(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    busy = pytest.raises(UserInputError, match=BUSY)
    with atomic_folder(tmp_path / "real" / "out"), busy, atomic_folder(tmp_path / "link" / "out"):
        pytest.fail("two write the same output")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    def die() -> None:
        with held(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(in_child(die))
    assert os.listdir(tmp_path) == [".out.qalora.lock"]
    with held(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_was_removed_and_made_anew_is_not_held_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One opens the file; its holder removes it; a third makes a new one: the first must see it."""
    path = lock_of(tmp_path / "out")
    first, second, third = Lock(path), Lock(path), Lock(path)
    assert first.acquire()
    flock, calls = fcntl.flock, []

    def late(descriptor: int, flags: int) -> None:
        calls.append(flags)
        if len(calls) == 1:  # `second` has opened the file
            first.release()
            assert third.acquire()
        flock(descriptor, flags)

    monkeypatch.setattr(locks, "_flock", late)
    assert not second.acquire()
    third.release()
    assert second.acquire()
    second.release()
    assert os.listdir(tmp_path) == []


def test_where_there_are_no_locks_a_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(descriptor: int, flags: int) -> None:
        raise OSError(38, os.strerror(38))

    out = tmp_path / "out"
    monkeypatch.setattr(locks, "_flock", missing)
    busy = pytest.raises(UserInputError, match=BUSY)
    with atomic_folder(out), busy, atomic_folder(out):
        pytest.fail("two write the same output")
    assert [name for name in os.listdir(tmp_path) if "locked" in name] == []


def test_many_processes_never_hold_a_lock_together(tmp_path: Path) -> None:
    """Each adds one to a number that it reads, holding the lock: none is lost."""
    number, rounds, count = tmp_path / "number", 40, 4
    number.write_text("0", "utf-8")

    def add() -> None:
        done = 0
        while done < rounds:
            lock = Lock(lock_of(tmp_path / "out"))
            if not lock.acquire():
                continue
            value = int(number.read_text("utf-8"))
            time.sleep(0.0005)
            number.write_text(str(value + 1), "utf-8")
            lock.release()
            done += 1

    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            add()
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert number.read_text("utf-8") == str(rounds * count)
    assert os.listdir(tmp_path) == ["number"]

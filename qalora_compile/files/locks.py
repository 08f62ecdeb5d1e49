"""One writer an output: a lock file beside it, for as long as it is written."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, SoftFileLock, Timeout

from qalora_compile.errors import UserInputError
from qalora_compile.files.faults import reporting_faults

if sys.platform == "win32":  # pragma: no cover
    _flock = None
else:
    from fcntl import LOCK_EX, LOCK_NB
    from fcntl import flock as _flock

_WITHOUT_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems of networks answer that have no such locks."""
_TRIES, _PAUSE_S = 4, 0.05
"""A reader that recovers an output holds its lock for a moment."""

_reserved: dict[tuple[int, Path], Lock] = {}
"""Locks of this process, by its number, that nothing inside it uses at the moment."""


class Lock:
    """A lock file that is gone when the lock is given back.

    The holder removes the file while it still holds it. Another process may have opened that very
    file before: it then holds a lock on something that has no name any more, sees so, and tries
    again. The lock of a process that dies is free at once; its file stays until the next writer.

    Args:
        path: The lock file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._soft: BaseFileLock | None = None

    def acquire(self) -> bool:
        """Take the lock; False where another process, or another part of this one, holds it."""
        if _flock is None:
            return self._acquire_softly()
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o666)
            try:
                _flock(descriptor, LOCK_EX | LOCK_NB)
                if _is_named(descriptor, self._path):
                    self._descriptor = descriptor
                    return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _WITHOUT_FLOCK:
                    raise
                return self._acquire_softly()
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)

    def release(self) -> None:
        """Remove the file, then give the lock back."""
        if self._soft is not None:
            self._soft.release()
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _acquire_softly(self) -> bool:
        """By a file that is there or not: where the system or the file system has no locks."""
        self._soft = SoftFileLock(self._path.with_name(f"{self._path.name}ed"), timeout=0)
        try:
            self._soft.acquire()
        except Timeout:
            self._soft = None
        return self._soft is not None


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def lock_of(path: Path) -> Path:
    """The lock file of an output."""
    return path.with_name(f".{path.name}.qalora.lock")


@contextmanager
def held(path: Path, *, reserve: bool = False) -> Iterator[None]:
    """Hold the lock of an output in the block, whose folder is made.

    Args:
        path: The output.
        reserve: The block is a command, in which something else will hold the lock again.

    Raises:
        UserInputError: another process writes the output, or something in this one does.
        OutputError: no file can be written there.
    """
    key = (os.getpid(), Path(os.path.realpath(path.parent), path.name))
    lock = None if reserve else _reserved.pop(key, None)
    if lock is not None:
        try:
            yield
        finally:
            _reserved[key] = lock
        return
    with reporting_faults(path):
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(lock_of(path))
        if not _taken(lock):
            raise UserInputError(
                f"another process is writing {path}", where=str(path), hint="wait for it, or end it"
            )
    try:
        if reserve:
            _reserved[key] = lock
        yield
    finally:
        _reserved.pop(key, None) if reserve else None
        lock.release()
        for parent in made:  # those that the block has left empty
            with suppress(OSError):
                parent.rmdir()


def _taken(lock: Lock) -> bool:
    for _ in range(_TRIES):
        if lock.acquire():
            return True
        time.sleep(_PAUSE_S)
    return False

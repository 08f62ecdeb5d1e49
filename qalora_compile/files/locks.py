"""One writer per output: a lock file is next to the output as long as it is written."""

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
"""Errors of network file systems without such locks."""
_TRIES, _PAUSE_S = 4, 0.05
"""A reader that recovers an output holds its lock briefly."""

_reserved: dict[tuple[int, Path], Lock] = {}
"""Locks that this process, by its id, holds and no code inside it uses at the moment."""


class Lock:
    """A lock file that is removed when the lock is released.

    The holder removes the file while it still holds the lock. Another process may already have
    opened that file; it then locks a file that has no name any more, notices this, and tries again.
    When a process dies, its lock is free at once, and the file stays until the next writer.

    Args:
        path: The lock file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._soft: BaseFileLock | None = None

    def acquire(self) -> bool:
        """Take the lock; False if another process, or another part of this one, holds it."""
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
        """Remove the file, then release the lock."""
        if self._soft is not None:
            self._soft.release()
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _acquire_softly(self) -> bool:
        """Use the existence of the file as the lock, if the file system has no locks."""
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
    """Hold the lock of an output in the block; creates the output's parent folder.

    Args:
        path: The output.
        reserve: Whether the block is a command, inside which other code will hold the lock again.

    Raises:
        UserInputError: another process, or other code in this one, writes the output.
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
                f"another process is writing {path}", where=str(path), hint="wait, or stop it"
            )
    try:
        if reserve:
            _reserved[key] = lock
        yield
    finally:
        _reserved.pop(key, None) if reserve else None
        lock.release()
        for parent in made:  # remove those that the block has left empty
            with suppress(OSError):
                parent.rmdir()


def _taken(lock: Lock) -> bool:
    for _ in range(_TRIES):
        if lock.acquire():
            return True
        time.sleep(_PAUSE_S)
    return False

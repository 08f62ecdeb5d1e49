"""One error type for everything that libraries raise when a file cannot be written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qalora_compile.errors import OutputError, QaloraError

_AGAIN = "then run the command again"
_HINTS = {
    errno.ENOSPC: f"make room, or write to another disk, {_AGAIN}",
    errno.EDQUOT: f"make room, or write to another disk, {_AGAIN}",
    errno.EFBIG: f"raise the limit (ulimit -f) or write to another file system, {_AGAIN}",
    errno.EROFS: "write to another folder",
}
"""Errors that only writing raises → what to do about them."""
_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) name the system's error."""
_CUT_OFF = re.compile(r"\d+ requested and \d+ written")
"""The message of numpy, which does not name the cause."""


def fault_of(error: BaseException, path: Path | str) -> OutputError | None:
    """The `OutputError` for an exception, or None if it does not concern writing `path`.

    Args:
        error: An exception of a library or the system.
        path: The output that was being written.
    """
    number = _number(error)
    if number in _HINTS:
        return _fault(path, number)
    if isinstance(error, OSError) and number is not None and _concerns(error.filename, path):
        return _fault(path, number)
    if isinstance(error, OSError) and _CUT_OFF.search(str(error)):
        return _fault(path, errno.ENOSPC if _is_full(Path(path)) else errno.EFBIG)
    return None


@contextmanager
def reporting_faults(path: Path) -> Iterator[None]:
    """Raise `OutputError` if the block fails because `path` cannot be written.

    If a library has wrapped an error of this package, the original error is raised.

    Raises:
        OutputError: the disk is full, a file is too large, or a permission is missing.
    """
    try:
        yield
    except QaloraError:
        raise
    except Exception as error:
        for cause in _causes(error):
            found = cause if isinstance(cause, QaloraError) else fault_of(cause, path)
            if found is not None:
                raise found from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and its chain of causes, outermost first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__


def _fault(path: Path | str, number: int) -> OutputError:
    return OutputError(
        f"cannot write {path}: {os.strerror(number)}",
        hint=_HINTS.get(number, "choose another --out, or change the permissions of the folder"),
    )


def _number(error: BaseException) -> int | None:
    """The system's error number; for exceptions other than `OSError`, it is in the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _IN_TEXT.search(str(error))
    return int(found[1]) if found else None


def _concerns(filename: object, path: Path | str) -> bool:
    """Whether a file is the output, its staging folder, or inside one of them."""
    if not isinstance(filename, (str, bytes)):
        return False
    named, output = Path(os.path.abspath(os.fsdecode(filename))), Path(os.path.abspath(path))
    if named in {output, *output.parents}:
        return True
    return named.is_relative_to(output) or any(
        part.startswith(f".{output.name}.") for part in named.parts
    )


def _is_full(path: Path) -> bool:
    existing = next((p for p in (path, *path.parents) if p.exists()), Path())
    if not hasattr(os, "statvfs"):
        return True
    found = os.statvfs(existing)
    return found.f_bavail * found.f_frsize < 1 << 20

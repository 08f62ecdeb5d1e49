"""One error for whatever a library raises when a file cannot be written."""

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
"""What only writing raises, and what to do about it."""
_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) say which error of the system it was."""
_CUT_OFF = re.compile(r"\d+ requested and \d+ written")
"""What numpy says, which does not know why."""


def fault_of(error: BaseException, path: Path | str) -> OutputError | None:
    """What an exception says about writing `path`; None where it is about something else.

    Args:
        error: What a library raised, or the system.
        path: What was being written.
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
    """Raise `OutputError` for what goes wrong in the block because `path` cannot be written.

    An error of ours that a library has wrapped into one of its own comes out as it was.

    Raises:
        OutputError: the disk is full, a file too large, a right is missing.
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
    """An exception and those that it was raised from, the outermost first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__


def _fault(path: Path | str, number: int) -> OutputError:
    return OutputError(
        f"cannot write {path}: {os.strerror(number)}",
        hint=_HINTS.get(number, "choose another --out, or see to the rights of the folder"),
    )


def _number(error: BaseException) -> int | None:
    """The number of the system's error; of libraries that are no OSError, from the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _IN_TEXT.search(str(error))
    return int(found[1]) if found else None


def _concerns(filename: object, path: Path | str) -> bool:
    """Whether a file is the output, its staging folder, or something in one of these."""
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

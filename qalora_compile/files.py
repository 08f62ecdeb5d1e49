"""Atomic outputs: a file or folder appears under its final name whole, or not at all.

Long work may give `resume`, a key of all that determines the output. Its unfinished files then
stay in a hidden folder of that key when the block fails or the process dies, and the next run with
the same key finds them there.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qalora_compile.errors import UserInputError

_PART = ".part"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output path that exists, unless it may be replaced.

    Raises:
        UserInputError: `path` exists and `overwrite` is false, or its parent is a file.
    """
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise UserInputError(
            f"the output {path} exists already",
            where=str(path),
            hint="choose another name, or pass --overwrite (overwrite=True) to replace it",
        )
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserInputError(f"{parent} is a file, not a folder", where=str(path))
            break


@contextmanager
def atomic_folder(
    path: Path, *, overwrite: bool = False, resume: str | None = None
) -> Iterator[Path]:
    """Give a folder to fill; rename it to `path` when the block ends without an error.

    Args:
        path: The folder to make.
        overwrite: Replace an existing one.
        resume: See the module; without it the folder is fresh, and gone after an error.

    Raises:
        UserInputError: `path` exists, or another process writes the same output.
    """
    check_output(path, overwrite=overwrite)
    with _staging(path, resume) as staging:
        yield staging
        os.chmod(staging, 0o755)
        _replace(staging, path)


@contextmanager
def atomic_files(
    path: Path, *, overwrite: bool = False, resume: str | None = None
) -> Iterator[Path]:
    """Like `atomic_folder` for a file and its companions (`model.onnx`, `model.onnx.data`).

    Yields the path to write to, in a temporary folder beside the final one. On success each file
    there is renamed into place, the main file last, so that it never refers to a missing companion.
    """
    check_output(path, overwrite=overwrite)
    with _staging(path, resume) as staging:
        yield staging / path.name
        written = sorted(staging.iterdir(), key=lambda p: p.name == path.name)
        for file in written:
            os.replace(file, path.parent / file.name)


@contextmanager
def _staging(path: Path, resume: str | None) -> Iterator[Path]:
    """A hidden folder beside `path`; with a key it outlives a failure, and other keys' go after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume is None:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserInputError(
            f"another process is writing {path}", where=str(path), hint="wait for it, or end it"
        ) from None
    try:
        folder = path.with_name(f".{path.name}.{resume}{_PART}")
        folder.mkdir(exist_ok=True)
        yield folder
        for old in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
            shutil.rmtree(old, ignore_errors=True)
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def keep_parts(folder: Path) -> None:
    """Empty the folder of an unfinished output, but for what is itself unfinished in it."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.endswith(_PART):
            shutil.rmtree(entry)
        elif not entry.is_dir():
            entry.unlink()


def _replace(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`; an old folder there is moved aside first and removed last."""
    if not path.exists():
        os.rename(staging, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.rename(path, aside / "old")
    try:
        os.rename(staging, path)
    except OSError:
        os.rename(aside / "old", path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a stable key order, atomically."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")
    os.replace(scratch, path)

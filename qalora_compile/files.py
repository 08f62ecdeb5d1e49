"""Atomic outputs: a file or folder appears under its final name whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError


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
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a fresh folder to fill; rename it to `path` when the block ends without an error."""
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield staging
        os.chmod(staging, 0o755)
        _replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def atomic_files(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Like `atomic_folder` for a file and its companions (`model.onnx`, `model.onnx.data`).

    Yields the path to write to, in a temporary folder beside the final one. On success each file
    there is renamed into place, the main file last, so that it never refers to a missing companion.
    """
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield staging / path.name
        written = sorted(staging.iterdir(), key=lambda p: p.name == path.name)
        for file in written:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserInputError: the file is missing or is not valid JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserInputError(f"the file {path.name} is missing", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserInputError(f"{path.name} is not valid JSON: {error}", where=str(path)) from error

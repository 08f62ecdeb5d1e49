"""Single files, replaced atomically, inside a folder that belongs to the writer."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qalora_compile.files.durable import settle, sync_folder
from qalora_compile.files.faults import reporting_faults


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which is renamed to `path` when the block ends without an error.

    It is in its own hidden folder, where libraries may leave other files. If the process is killed,
    the folder stays until the file is written again.

    Raises:
        OutputError: the file cannot be written.
    """
    folder = path.with_name(f".{path.name}.tmp")
    with reporting_faults(path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
            scratch = folder / path.name
            yield scratch
            settle(scratch, mode)
            os.replace(scratch, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with scratch_file(path) as scratch:
        scratch.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a stable key order, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_text(path, f"{text}\n")

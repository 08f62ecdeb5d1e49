"""Single files inside a folder that is the writer's own, replaced in one step."""

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
    """Give a path to write to, which is renamed to `path` when the block ends without an error.

    It lies in a hidden folder of its own, where libraries may leave what they like: a process that
    is killed leaves that folder, and the next that writes the file removes it.

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

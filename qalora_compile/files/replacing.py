"""Replace an old output by a finished one, and restore the old one after an interruption.

Files and folders next to an output while it is written (NAME is the output's name):

===========================  ====================================================================
`.NAME.qalora.lock`          the writer's lock (`locks`)
`.NAME.qalora.tmp`           the new output, unfinished
`.NAME.qalora.KEY.part`      the same for work that can be resumed
`.NAME.qalora.old`           the old folder, between the two renames that replace it
`.NAME.qalora.files`         the same for a file and its companions, with a list of them
===========================  ====================================================================

The holder of the lock knows that the others were left by processes that have died.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qalora_compile.errors import UserInputError
from qalora_compile.files.durable import settle, settle_folder, sync_folder
from qalora_compile.files.locks import held

_PART = ".part"
_LIST = ".names.json"


def staging_of(path: Path, resume: str | None) -> Path:
    """The folder in which an output is written."""
    return path.with_name(
        f".{path.name}.qalora.tmp" if resume is None else f".{path.name}.qalora.{resume}{_PART}"
    )


def recover(path: Path) -> None:
    """Restore an output that a dead process had moved aside; does nothing if a writer is at work.

    Raises:
        OutputError: it cannot be restored.
    """
    path = Path(os.path.abspath(path))
    if path.name and any(os.path.lexists(aside) for aside in (_old_folder(path), _old_files(path))):
        with suppress(UserInputError), held(path):
            mend(path)


def mend(path: Path) -> None:
    """Restore an output as `recover` does, and remove an unfinished one; needs the lock."""
    aside, files, staging = _old_folder(path), _old_files(path), staging_of(path, None)
    if files.is_dir() and not files.is_symlink():
        _put_back(path)
    if os.path.lexists(aside) and not os.path.lexists(path):
        os.rename(aside, path)
        sync_folder(path.parent)
    remove(staging)
    if os.path.lexists(aside):  # the new folder was already in its place
        os.rename(aside, staging)
        remove(staging)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Remove the unfinished folders of work that could be resumed."""
    form = re.compile(rf"\.{re.escape(path.name)}\.qalora\.[^.]+\{_PART}")
    for entry in path.parent.iterdir():
        if form.fullmatch(entry.name):
            remove(entry)


def keep_parts(folder: Path) -> None:
    """Empty the folder of an unfinished output, except for unfinished outputs inside it."""
    for entry in folder.iterdir():
        if not entry.is_dir() or entry.is_symlink():
            remove(entry)
        elif not entry.name.endswith(_PART):
            keep_parts(entry)
            if not any(entry.iterdir()):
                entry.rmdir()


def replace_folder(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`; an old folder there is moved aside first and removed last."""
    settle_folder(staging)
    if not os.path.lexists(path):
        os.rename(staging, path)
        sync_folder(path.parent)
        return
    aside = _old_folder(path)
    os.rename(path, aside)
    try:
        os.rename(staging, path)
    except BaseException:
        if not os.path.lexists(path):
            os.rename(aside, path)
        raise
    sync_folder(path.parent)
    mend(path)


def replace_files(staging: Path, path: Path, *, overwrite: bool) -> None:
    """Move the files in `staging` next to `path`, and the one with its name last.

    Raises:
        UserInputError: a companion exists and `overwrite` is false, or is a folder.
    """
    mode = staging.stat().st_mode & 0o666
    files = sorted(staging.iterdir(), key=lambda p: p.name == path.name)
    for file in files:
        settle(file, mode)
        target = path.parent / file.name
        if target.is_dir() or (os.path.lexists(target) and not overwrite):
            raise UserInputError(
                f"{target}, which belongs to the output, already exists",
                where=str(target),
                hint="choose another name, or pass --overwrite (overwrite=True) to replace it",
            )
    if len(files) > 1:
        _move_aside(staging, path, [file.name for file in files])
    try:
        for file in files:
            os.replace(file, path.parent / file.name)
    except BaseException:
        _put_back(path)
        raise
    sync_folder(path.parent)
    if len(files) > 1:
        os.rename(_old_files(path), staging / _LIST)  # from here on, the new files are valid


def _move_aside(staging: Path, path: Path, names: Sequence[str]) -> None:
    """Move the old files aside, and record the replacement for `_put_back`."""
    aside = _old_files(path)
    aside.mkdir()
    listed = aside / _LIST
    listed.write_text(json.dumps({"staging": staging.name, "names": list(names)}), "utf-8")
    settle(listed, 0o600)
    sync_folder(aside)
    sync_folder(path.parent)
    for name in reversed(names):  # the main file first, so that no companion of it is missing
        if os.path.lexists(path.parent / name):
            os.rename(path.parent / name, aside / name)


def _put_back(path: Path) -> None:
    """Undo an unfinished replacement of files, wherever it was interrupted."""
    aside = _old_files(path)
    if not aside.is_dir():
        return
    names, staging = _listed(path)
    for name in names:
        target = path.parent / name
        if staging.is_dir() and os.path.lexists(target) and not os.path.lexists(staging / name):
            os.replace(target, staging / name)  # a new file
        if os.path.lexists(aside / name):
            os.replace(aside / name, target)
    sync_folder(path.parent)
    remove(aside)


def _listed(path: Path) -> tuple[list[str], Path]:
    """The record of `_move_aside`; empty if it was interrupted before it moved anything."""
    try:
        value = json.loads((_old_files(path) / _LIST).read_text("utf-8"))
        names, staging = list(map(str, value["names"])), str(value["staging"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], path
    own = re.compile(rf"\.{re.escape(path.name)}\.qalora\.[^.]*\.?(tmp|part)")
    plain = all(Path(name).name == name and name.startswith(path.name) for name in names)
    return (names, path.with_name(staging)) if plain and own.fullmatch(staging) else ([], path)


def _old_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.qalora.old")


def _old_files(path: Path) -> Path:
    return path.with_name(f".{path.name}.qalora.files")

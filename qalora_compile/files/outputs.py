"""Outputs: which paths may be written, and how a folder or file is put there atomically.

Long-running work may pass `resume`, a key of everything that determines the output. If the process
is interrupted, the unfinished files then stay in a hidden folder for that key, where the next run
with the same key finds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qalora_compile.errors import OutputError, QaloraError, UserInputError
from qalora_compile.files.faults import reporting_faults
from qalora_compile.files.locks import held
from qalora_compile.files.marks import is_own_file, is_own_folder
from qalora_compile.files.replacing import (
    mend,
    recover,
    remove,
    remove_parts,
    replace_files,
    replace_folder,
    staging_of,
)

Inputs = Iterable[str | Path | None]
"""The inputs of a command: paths, or names of models that are not paths; None is ignored."""


def check_output(
    path: Path, *, overwrite: bool, inputs: Inputs = (), is_file: bool = False
) -> None:
    """Refuse an output path that exists, unless it may be replaced.

    Args:
        path: The output.
        overwrite: Whether it may be replaced, if this package wrote it.
        inputs: The inputs, which are never replaced.
        is_file: Whether the output is a file, not a folder.

    Raises:
        UserInputError: `path` exists and `overwrite` is false; it is an input, or contains one or
            the working directory; it is a link, or was not written by this package; or its parent
            is a file.
    """
    if Path(os.path.abspath(path)).name == "":
        raise UserInputError(f"the output {path} has no name", where=str(path))
    _check_inputs(path, inputs)
    recover(path)
    if os.path.lexists(path):
        if not overwrite:
            raise UserInputError(
                f"the output {path} already exists",
                where=str(path),
                hint="choose another name, or pass --overwrite (overwrite=True) to replace it",
            )
        _check_own(path, is_file=is_file)
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserInputError(f"{parent} is a file, not a folder", where=str(path))
            break


def _check_inputs(path: Path, inputs: Inputs) -> None:
    """Refuse an output whose replacement would remove an input or the working directory.

    Raises:
        UserInputError: see `check_output`.
    """
    if not os.path.lexists(path):
        return
    real = Path(os.path.realpath(path))
    if Path(os.path.realpath(Path.cwd())).is_relative_to(real):
        raise UserInputError(
            f"the output {path} holds the working directory",
            where=str(path),
            hint="choose another name",
        )
    for entry in inputs:
        given = None if entry is None else Path(os.path.realpath(entry))
        if given is not None and given.is_relative_to(real):
            what = "is the input" if given == real else f"holds the input {entry}"
            raise UserInputError(
                f"the output {path} {what}", where=str(path), hint="choose another name"
            )


def _check_own(path: Path, *, is_file: bool) -> None:
    """Refuse to replace a file or folder that this package did not write.

    Raises:
        UserInputError: see `check_output`.
    """
    if path.is_symlink():
        problem, hint = "is a link", "give the path that it points to"
    elif is_file and not path.is_file():
        problem, hint = "is not a file", "choose another name"
    elif not is_file and not path.is_dir():
        problem, hint = "is not a folder", "choose another name"
    elif is_own_file(path) if is_file else is_own_folder(path):
        return
    else:
        problem = "was not written by this tool"
        hint = "--overwrite replaces only what it wrote: choose another name, or remove it yourself"
    raise UserInputError(f"the output {path} {problem}", where=str(path), hint=hint)


@contextmanager
def reserve(
    path: Path,
    *,
    overwrite: bool,
    inputs: Inputs = (),
    go_on: bool = False,
) -> Iterator[None]:
    """Check an output as `check_output` does, and lock it in the block.

    Args:
        path: The output.
        overwrite: See `check_output`.
        inputs: See `check_output`.
        go_on: Whether an existing output is continued; then nothing is checked.

    Raises:
        UserInputError: see `check_output`, or another process writes the output.
        OutputError: no file can be written there.
    """
    inputs = list(inputs)
    if not go_on:
        check_output(path, overwrite=overwrite, inputs=inputs)
    with held(path, reserve=True):
        if not go_on:
            check_output(path, overwrite=overwrite, inputs=inputs)
        yield


@contextmanager
def atomic_folder(
    path: Path, *, overwrite: bool = False, resume: str | None = None
) -> Iterator[Path]:
    """Yield a folder to fill; it is renamed to `path` when the block ends without an error.

    Args:
        path: The folder to create.
        overwrite: Whether an existing folder may be replaced, if this package wrote it.
        resume: See the module; without it, the folder is empty at first and removed on an error.

    Raises:
        UserInputError: see `check_output`, or another process writes the same output.
        OutputError: the folder cannot be written.
    """
    check_output(path, overwrite=overwrite)
    with _staging(path, resume) as staging:
        yield staging
        check_output(path, overwrite=overwrite)
        replace_folder(staging, path)


@contextmanager
def atomic_files(
    path: Path, *, overwrite: bool = False, resume: str | None = None
) -> Iterator[Path]:
    """Like `atomic_folder` for a file and its companions (`model.onnx`, `model.onnx_data`).

    Yields the path to write to, in a temporary folder next to the final path. On success, each file
    in it is renamed to its place, the main file last, so that no companion of it is ever missing.
    """
    check_output(path, overwrite=overwrite, is_file=True)
    with _staging(path, resume) as staging:
        yield staging / path.name
        check_output(path, overwrite=overwrite, is_file=True)
        replace_files(staging, path, overwrite=overwrite)


@contextmanager
def _staging(path: Path, resume: str | None) -> Iterator[Path]:
    """A hidden folder next to `path`; with a key, it survives an interruption and a full disk."""
    with reporting_faults(path), held(path):
        mend(path)
        folder = staging_of(path, resume)
        folder.mkdir(exist_ok=resume is not None)
        try:
            with reporting_faults(path):
                yield folder
        except BaseException as error:
            wrong = isinstance(error, QaloraError) and not isinstance(error, OutputError)
            if resume is None or wrong:  # a new run would only fail again
                remove(folder)
            mend(path)  # an interruption may have left a half-replaced output
            raise
        remove(folder)
        remove_parts(path)

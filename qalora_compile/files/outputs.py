"""Outputs: which paths may be written, and how a folder or a file gets there in one piece.

Long work may give `resume`, a key of all that determines the output. Its unfinished files then
stay in a hidden folder of that key when the process is ended or dies, and the next run with the
same key finds them there.
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
"""What a command reads: paths, or names of models that are no paths; None is left out."""


def check_output(
    path: Path, *, overwrite: bool, inputs: Inputs = (), is_file: bool = False
) -> None:
    """Refuse an output path that exists, unless it may be replaced.

    Args:
        path: The output.
        overwrite: Replace it, if this package wrote it.
        inputs: What is read, which is never replaced.
        is_file: The output is a file, not a folder.

    Raises:
        UserInputError: `path` exists and `overwrite` is false, or is an input, or holds one or the
            working directory, or was not written by this package, or is a link; or its parent is a
            file.
    """
    if Path(os.path.abspath(path)).name == "":
        raise UserInputError(f"the output {path} has no name", where=str(path))
    _check_inputs(path, inputs)
    recover(path)
    if os.path.lexists(path):
        if not overwrite:
            raise UserInputError(
                f"the output {path} exists already",
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
    """Refuse an output whose replacement would take what is read, or where the user is.

    Raises:
        UserInputError: see above.
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
    """Refuse to replace what others wrote.

    Raises:
        UserInputError: see above.
    """
    if path.is_symlink():
        problem, hint = "is a link", "give the path that it leads to"
    elif is_file and not path.is_file():
        problem, hint = "is no file", "choose another name"
    elif not is_file and not path.is_dir():
        problem, hint = "is no folder", "choose another name"
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
    """Check an output as `check_output` does, and keep other processes from it in the block.

    Args:
        path: The output.
        overwrite: See `check_output`.
        inputs: See `check_output`.
        go_on: The output is gone on with: it may be there, and nothing is checked.

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
    """Give a folder to fill; rename it to `path` when the block ends without an error.

    Args:
        path: The folder to make.
        overwrite: Replace an existing one, if this package wrote it.
        resume: See the module; without it the folder is fresh, and gone after an error.

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
    """Like `atomic_folder` for a file and its companions (`model.onnx`, `model.onnx.data`).

    Yields the path to write to, in a temporary folder beside the final one. On success each file
    there is renamed into place, the main file last, so that it never refers to a missing companion.
    """
    check_output(path, overwrite=overwrite, is_file=True)
    with _staging(path, resume) as staging:
        yield staging / path.name
        check_output(path, overwrite=overwrite, is_file=True)
        replace_files(staging, path, overwrite=overwrite)


@contextmanager
def _staging(path: Path, resume: str | None) -> Iterator[Path]:
    """A hidden folder beside `path`; with a key it outlives an interruption, and a full disk."""
    with reporting_faults(path), held(path):
        mend(path)
        folder = staging_of(path, resume)
        folder.mkdir(exist_ok=resume is not None)
        try:
            with reporting_faults(path):
                yield folder
        except BaseException as error:
            wrong = isinstance(error, QaloraError) and not isinstance(error, OutputError)
            if resume is None or wrong:  # written again, it would be wrong again
                remove(folder)
            mend(path)  # it may have been interrupted while it replaced the old output
            raise
        remove(folder)
        remove_parts(path)

"""Whatever a library raises for a disk that is full, the error is ours and names the output."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qalora_compile.errors import OutputError, UserInputError
from qalora_compile.files import fault_of, reporting_faults

FULL, LARGE = os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, FULL), FULL),
        (OSError(errno.EFBIG, LARGE, "elsewhere"), LARGE),
        (OSError(errno.EDQUOT, "x"), os.strerror(errno.EDQUOT)),
        (Exception("File too large (os error 27)"), LARGE),
        (Exception(f"I/O error: {FULL} (os error 28)"), FULL),
        (OSError("4096 requested and 512 written"), LARGE),
        (PermissionError(errno.EACCES, "x", "out/file"), os.strerror(errno.EACCES)),
        (PermissionError(errno.EACCES, "x", ".out.qalora.tmp/file"), os.strerror(errno.EACCES)),
    ],
)
def test_the_error_names_the_output_and_the_cause(error: Exception, says: str) -> None:
    with pytest.raises(OutputError) as caught, reporting_faults(Path("out")):
        raise error
    assert caught.value.what == f"cannot write out: {says}"
    assert caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        ValueError("another"),
        FileNotFoundError(errno.ENOENT, "x", "the input"),
        OSError("no number"),
        Exception("(os error 2)"),
    ],
)
def test_what_is_about_something_else_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reporting_faults(Path("out")):
        raise error
    assert caught.value is error
    assert fault_of(error, "out") is None


def test_what_a_library_has_wrapped_is_found() -> None:
    for inner, kind in (
        (OSError(errno.ENOSPC, FULL), OutputError),
        (UserInputError("a"), UserInputError),
    ):
        with pytest.raises(kind), reporting_faults(Path("out")):
            try:
                raise inner
            except Exception as error:
                raise RuntimeError("wrapped") from error


def test_errors_of_ours_pass() -> None:
    with pytest.raises(UserInputError, match="a"), reporting_faults(Path("out")):
        raise UserInputError("a")

"""The exception tree: what is what, and what the messages say."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qalora_compile import errors
from qalora_compile.errors import (
    CaptureError,
    ExtensionError,
    InternalError,
    OutputError,
    PassError,
    PostconditionError,
    PreconditionError,
    QaloraError,
    UnsupportedError,
    UserInputError,
    VerificationError,
)


def test_the_tree() -> None:
    parents = {
        UserInputError: QaloraError,
        OutputError: QaloraError,
        CaptureError: QaloraError,
        PassError: QaloraError,
        PreconditionError: PassError,
        PostconditionError: PassError,
        UnsupportedError: QaloraError,
        ExtensionError: QaloraError,
        VerificationError: QaloraError,
        InternalError: QaloraError,
    }
    for child, parent in parents.items():
        assert child.__bases__ == (parent,)
    assert QaloraError.__bases__ == (Exception,)
    classes = {
        v for _, v in inspect.getmembers(errors, inspect.isclass) if v.__module__ == errors.__name__
    }
    assert classes == {QaloraError, *parents}


def test_message_has_what_where_and_what_to_do() -> None:
    error = UserInputError("the weight is bad", where="fc.weight", hint="reload it")
    assert str(error).splitlines() == [
        "the weight is bad",
        "  where: fc.weight",
        "  do:    reload it",
    ]
    assert (error.what, error.where, error.hint) == ("the weight is bad", "fc.weight", "reload it")


def test_message_leaves_out_what_is_not_known() -> None:
    assert str(InternalError("broken")) == "broken"
    assert str(InternalError("broken", hint="report it")) == "broken\n  do:    report it"


def test_pass_errors_name_the_pass_and_what_ran_before() -> None:
    error = PreconditionError(
        "no", where="node a", hint="yes", pass_name="fold", already_run=["quantize", "insert"]
    )
    assert str(error).splitlines() == [
        "no",
        "  where: node a",
        "  do:    yes",
        "  pass:  fold",
        "  after: quantize, insert",
    ]
    assert error.already_run == ("quantize", "insert")


def test_verification_errors_carry_the_report() -> None:
    report = cast(Any, SimpleNamespace(passed=False))
    assert VerificationError("they differ", report=report).report is report


@pytest.mark.parametrize("kind", [UserInputError, PostconditionError, UnsupportedError])
def test_one_except_clause_catches_all(kind: type[QaloraError]) -> None:
    with pytest.raises(QaloraError, match="anything"):
        raise kind("anything")

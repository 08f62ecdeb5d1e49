"""The exceptions of the package: every error that a user can cause derives from `QaloraError`.

Each error says what is wrong, where (pass, node, module path, file) and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qalora_compile.verdict import Finding


class QaloraError(Exception):
    """Base of every error raised on purpose by this package.

    Args:
        what: What is wrong, in one line.
        where: The pass, node, module path, file or line that it concerns, in one line.
        hint: What the user can do about it, in one line.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  do:    {self.hint}")
        return "\n".join(lines)


class UserInputError(QaloraError):
    """A configuration, shape, pattern, file or data line that the user gave is wrong."""


class OutputError(QaloraError):
    """A file could not be written: the disk is full, a limit is reached or a permission missing."""


class CaptureError(QaloraError):
    """`torch.export` could not convert the model to a graph."""


class PassError(QaloraError):
    """A pass failed; the pipeline adds the names of the passes that had already run."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        pass_name: str | None = None,
        already_run: Sequence[str] = (),
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.pass_name = pass_name
        self.already_run = tuple(already_run)

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.pass_name:
            lines.append(f"  pass:  {self.pass_name}")
        if self.already_run:
            lines.append(f"  after: {', '.join(self.already_run)}")
        return "\n".join(lines)


class PreconditionError(PassError):
    """The input program of a pass does not satisfy the pass's requirements."""


class PostconditionError(PassError):
    """The output program of a pass does not satisfy what the pass ensures."""


class UnsupportedError(QaloraError):
    """A feature, format, operator or target is not supported; names the nearest one that is."""


class ExtensionError(QaloraError):
    """An extension cannot be imported or has the wrong type, or its name is taken."""


class VerificationError(QaloraError):
    """Two programs that must be equivalent are not; holds the report or certificate."""

    def __init__(
        self,
        what: str,
        *,
        report: Finding,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.report = report


class InternalError(QaloraError):
    """A broken internal invariant: a bug of this package. Please report it."""

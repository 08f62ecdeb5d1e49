"""The one exception tree: every error a user can cause or meet derives from `QaloraError`.

Each error says what was wrong, where (pass, node, module path, file) and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qalora_compile.verdict import Finding


class QaloraError(Exception):
    """Base of every error raised on purpose by this package.

    Args:
        what: One line: what was wrong.
        where: One line: the pass, node, module path, file or line it concerns.
        hint: One line: what the user can do about it.
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
    """A file could not be written: the disk is full, a limit is reached, a right is missing."""


class CaptureError(QaloraError):
    """`torch.export` could not turn the model into a graph."""


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
    """The program given to a pass is not one that the pass accepts."""


class PostconditionError(PassError):
    """The program made by a pass breaks the pass's own promise."""


class UnsupportedError(QaloraError):
    """A feature, format, operator or target that is not supported; names the nearest that is."""


class ExtensionError(QaloraError):
    """An extension cannot be imported, is not what it has to be, or its name is taken."""


class VerificationError(QaloraError):
    """Two programs that had to agree do not; carries the report or certificate."""

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

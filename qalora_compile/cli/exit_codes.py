"""Exit codes of the commands."""

from __future__ import annotations

from qalora_compile.verdict import Verdict

DONE, FAILED, USAGE, SAMPLED = 0, 1, 2, 3
"""Success; a failed check; bad usage or input, an unwritable file, or undecided; a proof with parts
that were only tried on samples."""
INTERRUPTED, TERMINATED = 130, 143
"""128 plus the number of the signal, as in shells: SIGINT (Ctrl-C), SIGTERM."""

_OF_VERDICTS = {
    Verdict.PROVED: DONE,
    Verdict.PROVED_UNDER: DONE,
    Verdict.EQUAL: DONE,
    Verdict.SAMPLED: SAMPLED,
    Verdict.UNDECIDED: USAGE,
    Verdict.DIFFERENT: FAILED,
}


def exit_code(verdict: Verdict, *, allow_sampled: bool = False) -> int:
    """The exit code of a command that checked something.

    Args:
        verdict: What it found.
        allow_sampled: Whether SAMPLED is a success.
    """
    allowed = allow_sampled and verdict == Verdict.SAMPLED
    return DONE if allowed else _OF_VERDICTS[verdict]

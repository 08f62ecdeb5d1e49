"""Exit codes of the commands."""

from __future__ import annotations

from qalora_compile.verdict import Verdict

DONE, FAILED, USAGE = 0, 1, 2
"""Success; a failed check; bad usage or input, an unwritable file, or undecided."""
INTERRUPTED, TERMINATED = 130, 143
"""128 plus the number of the signal, as in shells: SIGINT (Ctrl-C), SIGTERM."""

_OF_VERDICTS = {Verdict.EQUAL: DONE, Verdict.DIFFERENT: FAILED, Verdict.UNDECIDED: USAGE}


def exit_code(verdict: Verdict) -> int:
    """The exit code of a command that checked something."""
    return _OF_VERDICTS[verdict]

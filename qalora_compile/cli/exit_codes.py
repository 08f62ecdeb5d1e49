"""What the exit code of a command says."""

from __future__ import annotations

from qalora_compile.verdict import Verdict

DONE, FAILED, USAGE = 0, 1, 2
"""Done; a check failed; bad usage or input, a file that cannot be written, or undecided."""
INTERRUPTED, TERMINATED = 130, 143
"""128 and the number of the signal, as shells count them: SIGINT (Ctrl-C), SIGTERM."""

_OF_VERDICTS = {Verdict.EQUAL: DONE, Verdict.DIFFERENT: FAILED, Verdict.UNDECIDED: USAGE}


def exit_code(verdict: Verdict) -> int:
    """What a command ends with that checked something."""
    return _OF_VERDICTS[verdict]

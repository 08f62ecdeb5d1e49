"""Regular expressions of unknown origin, matched by RE2 in time linear in the text.

Settings of checkpoints and adapters name layers by regular expressions. Python's engine backtracks,
and an expression like `(a+)+$` takes exponential time. RE2 does not backtrack, and it has neither
backreferences nor lookaround: such an expression is matched by Python's engine if it cannot
backtrack much, and otherwise refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted import quoted

_MAX_LENGTH = 10_000
_MAX_MEMORY = 1 << 22
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEATED = re.compile(r"[*+]|\{\d*,\d*\}")
_CHOICE = re.compile(r"\||(?<!\()\?")
_MOST_REPEATED, _MOST_CHOICES = 3, 6


def matches(pattern: str, text: str, *, full: bool) -> bool:
    """Whether an expression matches from the beginning of a text, to its end if `full`.

    Raises:
        UserInputError: the expression is malformed, longer than 10,000 characters, or cannot be
            matched in linear time and 4 MiB.
    """
    compiled = _compile(pattern)
    found = compiled.fullmatch(text) if full else compiled.match(text)
    return found is not None


@lru_cache(maxsize=256)
def _compile(pattern: str) -> Any:
    re2 = require("re2", extra="hf", purpose="match the expressions of a checkpoint")
    problem = f"it has {len(pattern)} characters" if len(pattern) > _MAX_LENGTH else ""
    options = re2.Options()
    options.log_errors, options.max_mem = False, _MAX_MEMORY
    try:
        if not problem:
            return re2.compile(pattern, options)
    except re2.error as error:
        text, *_ = error.args
        problem = text.decode() if isinstance(text, bytes) else str(error)
        if is_harmless(pattern):
            try:
                return re.compile(pattern)
            except (re.error, OverflowError):
                pass  # it is not a valid expression for Python either
    raise UserInputError(
        f"the expression {quoted(pattern)} cannot be matched: {problem}",
        hint="backreferences, lookaround and very large repetitions are not supported",
    )


def is_harmless(pattern: str) -> bool:
    """Whether Python's engine matches a layer's name in at most cubic time."""
    repeated, choices = (len(each.findall(pattern)) for each in (_REPEATED, _CHOICE))
    few = repeated <= _MOST_REPEATED and choices <= _MOST_CHOICES
    return few and _REPEATED_GROUP.search(pattern) is None

"""Regular expressions of strangers, matched by RE2: in time that grows with the text alone.

Settings of checkpoints and adapters name layers by regular expressions. Python's own engine tries
all ways to match one after another, and an expression like `(a+)+$` has exponentially many. RE2
follows all ways at once, and does not know backreferences and looking around: such an expression is
given to Python's engine if it is short of ways to match, and else refused.
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
    """Whether an expression matches from the beginning of a text, to its end if `whole`.

    Raises:
        UserInputError: the expression is malformed, longer than 10,000 characters, or beyond what
            can be matched in linear time and 4 MiB.
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
                pass  # it is no expression for Python either
    raise UserInputError(
        f"the expression {quoted(pattern)} cannot be matched: {problem}",
        hint="backreferences, looking around and very large repetitions are not supported",
    )


def is_harmless(pattern: str) -> bool:
    """Whether Python's engine matches the name of a layer soon: in the cube of its length."""
    repeated, choices = (len(each.findall(pattern)) for each in (_REPEATED, _CHOICE))
    few = repeated <= _MOST_REPEATED and choices <= _MOST_CHOICES
    return few and _REPEATED_GROUP.search(pattern) is None

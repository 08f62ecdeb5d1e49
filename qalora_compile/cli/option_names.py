"""Messages about the fields of a specification, in the names of the command's options."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qalora_compile.errors import QaloraError, UserInputError

_FIELDS = {"lr": "learning_rate", "eval-every": "evaluate_every", "rslora": "use_rslora"}
_FIELDS |= {"adapter": "kind"}
"""Option → field, where they have different names."""
_VALUE = re.compile(r"(--[\w-]+(?: is)?) '([\w.-]+)'")


def in_options(error: QaloraError, options: Iterable[str]) -> QaloraError:
    """An error about a field as one about the option that sets it; any other error unchanged.

    The specifications are used in Python too, so their messages name fields: `budget is None with
    bits 'auto'` becomes `--budget is not given with --bits auto`. Messages with a place are about
    a file, and stay.

    Args:
        error: The error of a command.
        options: The options of the command, without dashes.
    """
    if type(error) is not UserInputError or error.where is not None:
        return error
    fields = {_FIELDS.get(name, name.replace("-", "_")): f"--{name}" for name in options}
    hint = None if error.hint is None else _renamed(error.hint, fields)
    return UserInputError(_renamed(error.what, fields), hint=hint)


def _renamed(text: str, fields: dict[str, str]) -> str:
    for field, option in fields.items():
        said = rf"(?<![\w./'\"{{-]){field}"
        # A single word is a name only where its value follows: messages also speak of a loss.
        said += r"(?= is |, with | to a | '\w)" if "_" in field else r"(?= '\w)"
        text = re.sub(rf"^{field}(?= is )|{said}", option, text)
    return _VALUE.sub(r"\1 \2", text.replace(" is None", " is not given"))

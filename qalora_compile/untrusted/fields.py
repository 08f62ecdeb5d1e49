"""Compare JSON objects with the dataclasses that they describe; quote texts for messages."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_fields(kind: Any, row: object, what: str) -> dict[str, Any]:
    """Compare the names and types in a JSON object with the fields of a dataclass.

    Args:
        kind: The dataclass; its fields are texts, numbers, booleans, None, unions or tuples.
        row: The object; lists stand for tuples.
        what: What it describes, for messages.

    Returns:
        The fields as arguments of the dataclass, lists as tuples.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if not isinstance(row, dict) or required - row.keys() or row.keys() - hints.keys():
        raise ValueError(f"{what} has other fields than {', '.join(sorted(hints))}")
    for name, value in row.items():
        if not _is_of(hints[name], value):
            raise ValueError(f"{name} of {what} is {quoted(value)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}


def _is_of(hint: Any, value: object) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(each, value) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_of(get_args(hint)[0], v) for v in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def quoted(value: object, limit: int = 80) -> str:
    """A value from a file as one line of printable characters, for messages and generated text."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"

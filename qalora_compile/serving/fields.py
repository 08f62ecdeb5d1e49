"""Fields of a request's body, which may hold anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qalora_compile.serving.api_errors import ApiError, refused
from qalora_compile.untrusted import quoted


class Fields:
    """The fields of a JSON object; null counts as missing.

    Args:
        body: The object.
        known: The names that have a meaning.
        neutral: Names that are accepted with values that change nothing; empty: with any value.

    Raises:
        ApiError: another field is there.
    """

    def __init__(
        self, body: Mapping[str, Any], known: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]
    ) -> None:
        self._given = {name: value for name, value in body.items() if value is not None}
        for name, value in self._given.items():
            allowed = neutral.get(name)
            if name in known or allowed == ():
                continue
            if allowed is None:
                raise refused(f"unknown field {quoted(name)}", name[:100])
            if not any(type(value) is type(each) and value == each for each in allowed):
                raise refused(f"{name} {quoted(value)} is not supported", name)

    def get(self, name: str) -> Any:
        """The value of a field, or None."""
        return self._given.get(name)

    def flag(self, name: str) -> bool:
        """A truth value, false if missing."""
        value = self._given.get(name, False)
        if not isinstance(value, bool):
            raise refused(f"{name} is {quoted(value)}, and must be true or false", name)
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        """An integer in a range, or None if missing."""
        value = self._given.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise refused(
                f"{name} is {quoted(value)}, and must be an integer from {least} to {most}", name
            )
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """A finite number in a range, or None if missing."""
        value = self._given.get(name)
        if value is None:
            return None
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not valid or not least <= value <= most or not math.isfinite(value):
            raise refused(
                f"{name} is {quoted(value)}, and must be a number from {least:g} to {most:g}", name
            )
        return float(value)

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """A text or a list of several, none empty; empty if missing."""
        value = self._given.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > most:
            raise refused(f"{name} must be a text, or a list of at most {most} texts", name)
        return tuple(text(each, name) for each in values)


def text(value: Any, name: str, *, empty: bool = False) -> str:
    """A text, which must not be empty unless `empty` is set.

    Raises:
        ApiError: it is another value.
    """
    if not isinstance(value, str) or not (value or empty):
        raise refused(f"{name} holds {quoted(value)}, and must hold texts", name)
    return value


def tokens(value: list[Any], name: str, vocabulary: int) -> list[int]:
    """A list of token ids.

    Raises:
        ApiError: it holds something else.
    """
    for each in value:
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < vocabulary:
            raise refused(
                f"{name} holds {quoted(each)}, and tokens are 0 to {vocabulary - 1}", name
            )
    return value


def inputs(value: Any, name: str, vocabulary: int, most: int) -> list[str | list[int]]:
    """A text, a list of token ids, or a list of either.

    Raises:
        ApiError: it is something else, empty, or longer than `most`.
    """
    if value is None:
        raise refused(f"the field {name} is missing", name)
    if not isinstance(value, list):
        return [text(value, name)]
    if value and all(isinstance(each, int) for each in value):
        return [tokens(value, name, vocabulary)]
    if not value or len(value) > most:
        raise ApiError(400, f"{name} must hold 1 to {most} texts, not {len(value)}", param=name)
    found: list[str | list[int]] = []
    for each in value:
        if isinstance(each, list) and each:
            found.append(tokens(each, name, vocabulary))
        else:
            found.append(text(each, name))
    return found

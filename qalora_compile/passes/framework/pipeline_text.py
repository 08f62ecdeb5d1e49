"""Passes and pipelines as text: `quantize-groups{bits=4,group-size=32},insert-adapters`.

Grammar: passes are separated by commas; options follow in braces as `name=value` with dashes for
underscores. A value is a number, `true`, `false`, `none`, a bare word, a JSON string, or a list
`[a,"b c"]` of those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qalora_compile.errors import UserInputError

_BARE = re.compile(r"[A-Za-z_*?./@-][A-Za-z0-9_*?./@-]*")
_NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?")
_DEPTH = 8
_WORDS = {"true": True, "false": False, "none": None}


def format_pass(name: str, options: Mapping[str, Any]) -> str:
    """`name{option=value,…}` with every option; only `name` for a pass without options."""
    if not options:
        return name
    inner = ",".join(f"{k.replace('_', '-')}={_format(v)}" for k, v in options.items())
    return f"{name}{{{inner}}}"


def _format(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{','.join(_format(v) for v in value)}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = _BARE.fullmatch(value) and value not in _WORDS and not _NUMBER.match(value)
        return value if plain else json.dumps(value)
    return repr(value)


def parse_passes(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The (name, options) pairs of a pipeline text.

    Raises:
        UserInputError: the text does not follow the grammar; the position is named.
    """
    return _Parser(text).passes()


class _Parser:
    """Recursive descent over one line of text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def passes(self) -> list[tuple[str, dict[str, Any]]]:
        found = [self._pass()]
        while self._take(","):
            found.append(self._pass())
        self._space()
        if self.at != len(self.text):
            raise self._error("expected ',' between passes")
        return found

    def _pass(self) -> tuple[str, dict[str, Any]]:
        name = self._match(_BARE, "a pass name")
        options: dict[str, Any] = {}
        if self._take("{") and not self._take("}"):
            while True:
                key = self._match(_BARE, "an option name").replace("-", "_")
                if key in options:
                    raise self._error(f"the option {key} is given twice,")
                self._expect("=")
                options[key] = self._value()
                if self._take("}"):
                    break
                self._expect(",")
        return name, options

    def _value(self, depth: int = 0) -> Any:
        if depth > _DEPTH:
            raise self._error("lists are nested too deeply")
        if self._take("["):
            items: list[Any] = []
            if self._take("]"):
                return ()
            while True:
                items.append(self._value(depth + 1))
                if self._take("]"):
                    return tuple(items)
                self._expect(",")
        self._space()
        if self.text.startswith('"', self.at):
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                raise self._error("unfinished string") from None
            self.at = end
            return value
        number = _NUMBER.match(self.text, self.at)
        if number:
            self.at = number.end()
            return float(number[0]) if number[1] or number[2] else int(number[0])
        word = self._match(_BARE, "a value")
        return _WORDS.get(word, word)

    def _space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _take(self, token: str) -> bool:
        self._space()
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise self._error(f"expected {token!r}")

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._space()
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self._error(f"expected {what}")
        self.at = match.end()
        return match[0]

    def _error(self, what: str) -> UserInputError:
        return UserInputError(
            f"{what} at position {self.at} of the pipeline",
            where=f"{self.text[: self.at]}⟶{self.text[self.at :]}",
            hint="write passes as name{option=value,option=[a,b]},name",
        )

"""Tokens as text while they are generated, and strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for the first bytes of a character."""


class TextStream:
    """The text that each token adds.

    Tokenizers write a token differently at the start of a text, so the tokens before it are decoded
    with it: those since the last two places where the text was complete.

    Args:
        tokenizer: A tokenizer of transformers.
        skip_special: Whether special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Any, *, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._recent: list[int] = []
        self._known = 0
        """How many of the recent tokens have been written."""

    def add(self, token: int) -> str:
        """The text of a token; "" if a character is not complete yet."""
        self._recent.append(token)
        text = self._decode(self._recent)
        if text.endswith(_UNFINISHED):
            return ""
        added = text[len(self._decode(self._recent[: self._known])) :]
        if added:  # otherwise, as after a special token, the one before it shows how to go on
            self._recent = self._recent[self._known :]
        self._known = len(self._recent)
        return added

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=self._skip))


class StopStrings:
    """A text that ends before the first of several strings.

    Text that may be the beginning of such a string is held back until more of it is known.

    Args:
        strings: The strings, none of which is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False
        """Whether one of the strings was found."""

    def add(self, text: str) -> str:
        """The text that can be shown after `text` was added."""
        text = self._held + text
        places = [place for each in self._strings if (place := text.find(each)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, each) for each in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """The text that is held back at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text with which a string begins."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)

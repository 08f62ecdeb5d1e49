"""Tokens as text, and strings that end a text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.serving.text_stream import StopStrings, TextStream


class Bytes:
    """A tokenizer whose tokens are bytes, and which drops the space before the first word."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        kept = [token for token in tokens if not (skip_special_tokens and token == 0)]
        return bytes(kept).decode("utf-8", errors="replace").removeprefix(" ")


def written(tokens: list[int], **options: Any) -> list[str]:
    stream = TextStream(Bytes(), **{"skip_special": True} | options)
    return [stream.add(token) for token in tokens]


@given(st.text(st.characters(exclude_characters="\ufffd\0", codec="utf-8"), max_size=30))
def test_the_pieces_are_the_text(text: str) -> None:
    tokens = list(text.encode())
    assert "".join(written(tokens)) == text.removeprefix(" ")


def test_a_character_appears_when_it_is_complete() -> None:
    assert written(list(" é a".encode())) == ["", "", "é", " ", "a"]
    assert written([104, 0, 105]) == ["h", "", "i"]
    assert written([104, 0], skip_special=False) == ["h", "\0"]


def test_a_special_token_does_not_make_the_next_word_the_first() -> None:
    pieces = written([*b"a", 0, 0, *b" b"])
    assert "".join(pieces) == "a b"


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    strings = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += strings.add(piece)
        if strings.found:
            return shown, True
    return shown + strings.rest(), False


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_string(text: str, stops: list[str]) -> None:
    shown, found = cut(list(text), stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert found == bool(ends)
    if not found:
        assert shown == text
    else:
        assert text.startswith(shown) and not any(stop in shown for stop in stops)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


@pytest.mark.parametrize("pieces", [["a", "b", "c", "d"], ["abcd"], ["ab", "cd"]])
def test_what_may_begin_a_string_is_held_back(pieces: list[str]) -> None:
    strings = StopStrings(["cd"])
    assert "".join(strings.add(piece) for piece in pieces) == "ab"
    assert strings.found and strings.rest() == ""
    again = StopStrings(["cd", "bx"])
    assert again.add("ab") == "a"
    assert again.rest() == "b"

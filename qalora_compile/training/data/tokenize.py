"""Tokenization of texts, with special tokens, cuts, and errors that name the line.

A text that is far too long is cut before it is tokenized. Tokens depend only on their
neighbourhood, so a part with twice the tokens that are kept has the same tokens, except near the
cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qalora_compile.errors import UserInputError

_CHARACTERS = 32
"""Characters of a part per token that is kept: several times as many as in most texts."""
_LEAST_CHARACTERS = 4096

Span = tuple[int, int]


class Texts:
    """A tokenizer with errors that name the line.

    Special tokens are those that it adds around a text, such as begin and end tokens.

    Args:
        tokenizer: A tokenizer of transformers.
        limit: How many tokens of a text are kept; None: all.
    """

    def __init__(self, tokenizer: Any, limit: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._limit = limit

    @cached_property
    def special(self) -> int:
        """The number of special tokens, which even an empty text has."""
        return len(self.encode("", "an empty text"))

    def encode(self, text: str, where: str, **options: Any) -> list[int]:
        """The tokens of a text with special tokens."""
        check_characters(text, where)
        return list(self._call(text, where, **options).input_ids)

    def _call(self, text: str, where: str, **options: Any) -> Any:
        try:
            return self.tokenizer(text, **options)
        except Exception as error:  # tokenizers raise many types
            raise UserInputError(
                f"the tokenizer cannot read the text: {error}", where=where
            ) from error

    def plain(self, text: str, where: str) -> list[int]:
        """The tokens of a text without special tokens."""
        return self.encode(text, where, add_special_tokens=False)

    def encode_field(self, text: str, key: str, where: str) -> list[int]:
        """The tokens of a field with special tokens; a text without tokens is refused.

        If the text is far too long, these are the tokens of its beginning, more than are kept.
        """
        tokens = self.encode(self.head(text, where), where)
        # Only so short a text can be empty, so the second call is rare.
        if len(tokens) <= self.special and not self.plain(text, where):
            raise UserInputError(
                f"the {key} holds no token", where=where, hint="leave the line out"
            )
        return tokens

    def head(self, text: str, where: str) -> str:
        """The beginning of a text, with more tokens than are kept; a short text is not cut."""
        return text[: self._part(text, where, tail=False)]

    def tail(self, text: str, where: str) -> int:
        """The start of the last part of a text, with more tokens than are kept; 0 if it fits."""
        return len(text) - self._part(text, where, tail=True)

    def _part(self, text: str, where: str, *, tail: bool) -> int:
        """The number of characters at the start or end of a text with twice the kept tokens."""
        if self._limit is None:
            return len(text)
        size = _CHARACTERS * self._limit + _LEAST_CHARACTERS
        while 2 * size < len(text):
            part = text[-size:] if tail else text[:size]
            if len(self.plain(part, where)) > 2 * self._limit + self.special:
                return size
            size *= 4
        return len(text)

    def joint(self, prompt: str, completion: str, where: str) -> tuple[list[int], int]:
        """The tokens of a prompt with its completion, and how many of them belong to the prompt.

        Tokenizers do not cut a text at the end of the prompt: `Answer: ` and `4` are two tokens in
        the joint text, and three if tokenized separately. A token with characters of both is
        learned. Special tokens after the text are left out. If the text is far too long, the
        tokens are those of its end, more than are kept.
        """
        text = prompt + completion
        begin = self.tail(text, where)
        text, prompt = text[begin:], prompt[begin:]
        if not self._has_offsets:
            return self._joint_by_prefix(prompt, text, where)
        check_characters(text, where)
        found = self._call(
            text, where, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        own = [i for i, special in enumerate(found.special_tokens_mask) if not special]
        learned = [i for i in own if not prompt or found.offset_mapping[i][1] > len(prompt)]
        tokens = list(found.input_ids)[: own[-1] + 1 if own else 0]
        return tokens, learned[0] if learned else len(tokens)

    @property
    def _has_offsets(self) -> bool:
        return bool(getattr(self.tokenizer, "is_fast", False))

    def _joint_by_prefix(self, prompt: str, text: str, where: str) -> tuple[list[int], int]:
        """The same for a tokenizer without offsets of its tokens in the text."""
        own, first = self.plain(text, where), self.plain(prompt, where)
        begin = common_length(own, first)
        written = self.encode(text, where)
        for size in range(len(written) - len(own) + 1):
            if written[size : size + len(own)] == own:
                return written[: size + len(own)], size + begin
        raise UserInputError(
            "without special tokens, the tokenizer cuts the text differently",
            where=where,
            hint='give token ids: {"input_ids": […], "labels": […]}',
        )

    def marked(self, text: str, spans: Sequence[Span], where: str) -> tuple[list[int], list[bool]]:
        """The tokens of a text, and for each whether it overlaps with one of the spans.

        Args:
            text: The text, which already includes its special tokens. If it is far too long, only
                its end is tokenized, with more tokens than are kept.
            spans: Ranges of characters, in order.
            where: Place of the text, for errors.
        """
        begin = self.tail(text, where)
        text, spans = text[begin:], [(max(a - begin, 0), b - begin) for a, b in spans if b > begin]
        if not self._has_offsets:
            tokens = self.plain(text, where)
            places = [
                tuple(common_length(tokens, self.plain(text[:end], where)) for end in span)
                for span in spans
            ]
            return tokens, [any(a <= i < b for a, b in places) for i in range(len(tokens))]
        check_characters(text, where)
        found = self._call(text, where, return_offsets_mapping=True, add_special_tokens=False)
        offsets = found.offset_mapping
        return list(found.input_ids), [any(b > c and a < d for c, d in spans) for a, b in offsets]

    def ended(self, tokens: list[int]) -> list[int]:
        """Tokens followed by the one that ends a text, which not every tokenizer adds."""
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, int(end)]


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt as in training: special tokens before it, and none after it.

    Raises:
        UserInputError: the tokenizer cannot read it.
    """
    texts, where = Texts(tokenizer), "the prompt"
    if texts.plain(prompt, where):
        return texts.joint(prompt, "", where)[0]
    tokens, begin = texts.joint("", "a", where)  # any text shows which tokens precede it
    return tokens[:begin]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def check_characters(text: str, where: str) -> None:
    """Check that a text can be encoded: JSON can hold a lone surrogate, half of a character.

    Raises:
        UserInputError: it holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserInputError(
            f"a text holds half of a character: {error}",
            where=where,
            hint="an escape such as \\ud83d needs its second half, such as \\ude00",
        ) from error

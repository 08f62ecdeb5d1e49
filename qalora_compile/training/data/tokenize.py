"""Texts as tokens: with a tokenizer's own special tokens, errors that name the line, and cuts.

A text that is far longer than what is kept of it is cut before it is tokenized: tokens depend on
their neighbourhood alone, so a part with twice the tokens that are kept has the same ones, away
from where it was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qalora_compile.errors import UserInputError

_CHARACTERS = 32
"""Characters of a part for each token that is kept: several times those of most texts."""
_LEAST_CHARACTERS = 4096

Span = tuple[int, int]


class Texts:
    """A tokenizer whose errors name the line.

    Special tokens are those that it writes around a text, such as the ones that begin and end it.

    Args:
        tokenizer: Of transformers.
        limit: How many tokens of a text are kept; None: all.
    """

    def __init__(self, tokenizer: Any, limit: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._limit = limit

    @cached_property
    def special(self) -> int:
        """How many tokens a text of none has."""
        return len(self.encode("", "an empty text"))

    def encode(self, text: str, where: str, **options: Any) -> list[int]:
        """The tokens of a text, and special ones."""
        check_characters(text, where)
        return list(self._call(text, where, **options).input_ids)

    def _call(self, text: str, where: str, **options: Any) -> Any:
        try:
            return self.tokenizer(text, **options)
        except Exception as error:  # tokenizers raise types of many kinds
            raise UserInputError(
                f"the tokenizer cannot read the text: {error}", where=where
            ) from error

    def plain(self, text: str, where: str) -> list[int]:
        """The tokens of a text alone."""
        return self.encode(text, where, add_special_tokens=False)

    def encode_field(self, text: str, key: str, where: str) -> list[int]:
        """The tokens of a field, and special ones; a text that holds none is refused.

        Of a text that is far too long, the tokens of its beginning, more than are kept.
        """
        tokens = self.encode(self.head(text, where), where)
        # only what is that short can be empty: the second call is saved for the others
        if len(tokens) <= self.special and not self.plain(text, where):
            raise UserInputError(
                f"the {key} holds no token", where=where, hint="leave the line out"
            )
        return tokens

    def head(self, text: str, where: str) -> str:
        """The beginning of a text, with more tokens than are kept; all of one that is not long."""
        return text[: self._part(text, where, tail=False)]

    def tail(self, text: str, where: str) -> int:
        """Where the end of a text begins, with more tokens than are kept; 0 if it is not long."""
        return len(text) - self._part(text, where, tail=True)

    def _part(self, text: str, where: str, *, tail: bool) -> int:
        """How many characters of one end of a text have twice the tokens that are kept."""
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
        """The tokens of a prompt with its completion, and how many of them are the prompt's.

        Tokenizers do not cut a text at a prompt's end: `Answer: ` and `4` are two tokens of the
        joint text, and three of the two parts. A token in which both have characters is learned.
        Special tokens that the tokenizer writes behind the text are left out. Of a text that is far
        too long, the tokens of its end, more than are kept.
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
        """The same of a tokenizer that does not say where its tokens stand in a text."""
        own, first = self.plain(text, where), self.plain(prompt, where)
        begin = common_length(own, first)
        written = self.encode(text, where)
        for size in range(len(written) - len(own) + 1):
            if written[size : size + len(own)] == own:
                return written[: size + len(own)], size + begin
        raise UserInputError(
            "the tokenizer reads the text in another way without special tokens",
            where=where,
            hint='give token ids: {"input_ids": […], "labels": […]}',
        )

    def marked(self, text: str, spans: Sequence[Span], where: str) -> tuple[list[int], list[bool]]:
        """The tokens of a text alone, and for each whether some of it is in one of the spans.

        Args:
            text: With the special tokens that it is to have.
            spans: First character, and the one behind the last, in order. Of a text that is far too
                long, the end is tokenized, with more tokens than are kept.
            where: Of the text.
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
        """Tokens with the one that ends a text, which not every tokenizer writes."""
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, int(end)]


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as training has it: special tokens before it, and none behind, where it goes on.

    Raises:
        UserInputError: the tokenizer cannot read it.
    """
    texts, where = Texts(tokenizer), "the prompt"
    if texts.plain(prompt, where):
        return texts.joint(prompt, "", where)[0]
    tokens, begin = texts.joint("", "a", where)  # any text shows what stands before one
    return tokens[:begin]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first elements two sequences share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def check_characters(text: str, where: str) -> None:
    """See that a text can be written: JSON can name one surrogate alone, half of a character.

    Raises:
        UserInputError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserInputError(
            f"a text holds half of a character: {error}",
            where=where,
            hint="a code such as \\ud83d needs its second one, \\ude00",
        ) from error

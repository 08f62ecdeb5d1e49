"""One line of a JSON lines file as a training example.

==================================  ===========================================================
`{"prompt": …, "completion": …}`    loss on the completion
`{"messages": [{role, content}]}`   loss on the assistant's turns, by the model's chat template
`{"text": …}`                       loss on every token
`{"input_ids": […], "labels": […]}` for models without a tokenizer; `labels` may be left out
`{"text": …, "label": …}`           of a classification task
==================================  ===========================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.training.examples import IGNORED, Example
from qalora_compile.untrusted import parse_json
from qalora_compile.untrusted.tokenizer import render_chat

COMPLETIONS, EVERYTHING = "completions", "everything"
LEARN = (COMPLETIONS, EVERYTHING)
"""What of a prompt with its completion, or of a chat, carries loss."""

_KINDS = ("input_ids", "messages", "completion", "text")
"""The field that says of which kind a line is."""
_CUT_AT_END = ("input_ids", "text")
"""Kinds that lose their end where they are too long; the others lose their beginning."""
_LARGEST = 2**31 - 1
"""What a token id can be: a cache stores 32 bits, and no vocabulary has more."""


class _Texts:
    """A tokenizer whose errors name the line.

    Special tokens are those that it writes around a text, such as the ones that begin and end it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> int:
        """How many tokens a text of none has."""
        return len(self.encode("", "an empty text"))

    def encode(self, text: str, where: str, **options: Any) -> list[int]:
        """The tokens of a text, and special ones."""
        _check_characters(text, where)
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

    def whole(self, row: dict[str, Any], key: str, where: str) -> list[int]:
        """The tokens of a field, and special ones; a text that holds none is refused."""
        text = _string(row, key, where)
        tokens = self.encode(text, where)
        # only what is that short can be empty: the second call is saved for the others
        if len(tokens) <= self.special and not self.plain(text, where):
            raise UserInputError(
                f"the {key} holds no token", where=where, hint="leave the line out"
            )
        return tokens

    def joint(self, prompt: str, completion: str, where: str) -> tuple[list[int], int]:
        """The tokens of a prompt with its completion, and how many of them are the prompt's.

        Tokenizers do not cut a text at a prompt's end: `Answer: ` and `4` are two tokens of the
        joint text, and three of the two parts. A token in which both have characters is learned.
        Special tokens that the tokenizer writes behind the text are left out.
        """
        text = prompt + completion
        if not getattr(self.tokenizer, "is_fast", False):
            return self._joint_by_prefix(prompt, text, where)
        _check_characters(text, where)
        found = self._call(
            text, where, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        own = [i for i, special in enumerate(found.special_tokens_mask) if not special]
        learned = [i for i in own if not prompt or found.offset_mapping[i][1] > len(prompt)]
        tokens = list(found.input_ids)[: own[-1] + 1 if own else 0]
        return tokens, learned[0] if learned else len(tokens)

    def _joint_by_prefix(self, prompt: str, text: str, where: str) -> tuple[list[int], int]:
        """The same of a tokenizer that does not say where its tokens stand in a text."""
        own, first = self.plain(text, where), self.plain(prompt, where)
        pairs = enumerate(zip(own, first, strict=False))
        begin = next((i for i, (a, b) in pairs if a != b), min(len(own), len(first)))
        written = self.encode(text, where)
        for size in range(len(written) - len(own) + 1):
            if written[size : size + len(own)] == own:
                return written[: size + len(own)], size + begin
        raise UserInputError(
            "the tokenizer reads the text in another way without special tokens",
            where=where,
            hint='give token ids: {"input_ids": […], "labels": […]}',
        )

    def ended(self, tokens: list[int]) -> list[int]:
        """Tokens with the one that ends a text, which not every tokenizer writes."""
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, int(end)]

    def render(self, messages: Sequence[Any], where: str, *, prompt: bool) -> list[int]:
        """The tokens of a chat; `prompt`: up to where an answer begins."""
        text = render_chat(self.tokenizer, messages, prompt=prompt, where=where)
        return self.plain(text, where)


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as training has it: special tokens before it, and none behind, where it goes on.

    Raises:
        UserInputError: the tokenizer cannot read it.
    """
    texts, where = _Texts(tokenizer), "the prompt"
    if texts.plain(prompt, where):
        return texts.joint(prompt, "", where)[0]
    tokens, begin = texts.joint("", "a", where)  # any text shows what stands before one
    return tokens[:begin]


@dataclass(frozen=True, kw_only=True)
class LineReader:
    """Makes examples of lines.

    Attributes:
        tokenizer: Of the model; None where the lines hold token ids.
        max_length: The most tokens of an example (and as many for the encoder).
        decoder_start: The token that the decoder of an encoder-decoder model begins with: prompts
            are then for the encoder, completions for the decoder. None: there is no encoder.
        learn: `completions`, or `everything` for loss on prompts too.
        classes: Names of the classes of a classification task, in the order of the logits; None:
            the task is to predict tokens.
    """

    tokenizer: Any
    max_length: int
    decoder_start: int | None = None
    learn: str = COMPLETIONS
    classes: tuple[str, ...] | None = None

    @cached_property
    def _texts(self) -> _Texts:
        return _Texts(self.tokenizer)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserInputError(f"max_length is {self.max_length}", hint="use 2 or more")
        if self.learn not in LEARN:
            raise UserInputError(f"learn is {self.learn!r}", hint=f"use one of {', '.join(LEARN)}")

    def read(self, line: str, where: str) -> tuple[Example, bool]:
        """The example of a line, cut to fit, and whether it was cut.

        Raises:
            UserInputError: the line is malformed.
        """
        row = parse_line(line, where)
        if self.classes is not None:
            return self._read_labelled(row, self.classes, where)
        if self.decoder_start is not None:
            example, cut = self._read_pair(row, self.decoder_start, where), slice(self.max_length)
        else:
            kind = kind_of(row, where)
            example = self._read_kind(kind, row, where)
            at_end = kind in _CUT_AT_END
            cut = slice(self.max_length) if at_end else slice(-self.max_length, None)
        if example.length <= self.max_length:
            return example, False
        return Example(example.tokens[cut], example.labels[cut], example.source[cut]), True

    def _read_kind(self, kind: str, row: dict[str, Any], where: str) -> Example:
        if kind == "input_ids":
            return _from_ids(row, where)
        if self.tokenizer is None:
            raise UserInputError(
                "the model has no tokenizer to read text with",
                where=where,
                hint='give token ids: {"input_ids": […]}, or a model folder with tokenizer',
            )
        if kind == "text":
            return _from_text(row, self._texts, where)
        read = _from_messages if kind == "messages" else _from_completion
        example = read(row, self._texts, where)
        if self.learn == EVERYTHING and example.learns:
            return Example(example.tokens, example.tokens)
        return example

    def _read_pair(self, row: Any, decoder_start: int, where: str) -> Example:
        """Text for the encoder, and what the decoder makes of it, each as the tokenizer ends it."""
        known = isinstance(row, dict) and {"prompt", "completion"} <= set(row)
        if not known or self.tokenizer is None:
            raise UserInputError(
                "a model with an encoder learns from text to text",
                where=where,
                hint='use {"prompt": "…", "completion": "…"}, and a model that brings its '
                "tokenizer",
            )
        source = self._texts.whole(row, "prompt", where)
        target = self._texts.ended(self._texts.whole(row, "completion", where))
        return Example((decoder_start, *target), (IGNORED, *target), tuple(source))

    def _read_labelled(
        self, row: Any, classes: tuple[str, ...], where: str
    ) -> tuple[Example, bool]:
        name = class_name(row, where)
        if name not in classes:
            raise UserInputError(
                f"the label {name!r} is none that was trained on",
                where=where,
                hint=f"known: {', '.join(classes)}",
            )
        if self.tokenizer is None:
            raise UserInputError("the model has no tokenizer to read text with", where=where)
        tokens = self._texts.whole(row, "text", where)
        cut = len(tokens) > self.max_length
        if cut:  # by the tokenizer, which keeps the token that ends a text
            limits = {"truncation": True, "max_length": self.max_length}
            tokens = self._texts.encode(row["text"], where, **limits)
            if len(tokens) <= self._texts.special:
                raise UserInputError(
                    f"{self.max_length} tokens hold nothing of the text",
                    where=where,
                    hint="cut texts later",
                )
        return Example(tuple(tokens), (), label=classes.index(name)), cut


def parse_line(line: str, where: str) -> Any:
    """The JSON value of a line.

    Raises:
        UserInputError: it is no JSON, or beyond the limits of `untrusted.read_json`.
    """
    return parse_json(line, Path(where), what="the line", finite=True)


def kind_of(row: Any, where: str) -> str:
    """The field that says of which kind a line is.

    Raises:
        UserInputError: it is of none, or of two.
    """
    found = [kind for kind in _KINDS if isinstance(row, dict) and kind in row]
    if len(found) == 1:
        return found[0]
    raise UserInputError(
        f"the line has {' and '.join(found)}: which of them is meant?"
        if found
        else "the line has none of the known forms",
        where=where,
        hint='use one of {"text"}, {"prompt", "completion"}, {"messages"} and {"input_ids"}',
    )


def class_name(row: Any, where: str) -> str:
    """The label of a line of a classification task, as text.

    Raises:
        UserInputError: there is none, or it is no text and no whole number.
    """
    label = row.get("label") if isinstance(row, dict) else None
    if isinstance(label, str) and label:
        _check_characters(label, where)
        return label
    if isinstance(label, int):  # true and false too
        return json.dumps(label)
    raise UserInputError(
        "the line has no label",
        where=where,
        hint='a classification task learns from {"text": "…", "label": "…"}; labels are texts or '
        "whole numbers",
    )


def _from_ids(row: dict[str, Any], where: str) -> Example:
    tokens, labels = row["input_ids"], row.get("labels", row["input_ids"])
    valid = all(
        isinstance(values, list) and all(type(v) is int for v in values)  # true is no token
        for values in (tokens, labels)
    )
    if not valid or len(tokens) != len(labels):
        raise UserInputError(
            "input_ids and labels must be integer lists of one length", where=where
        )
    learned = [label for label in labels if label != IGNORED]
    for name, values in (("input_ids", tokens), ("labels", learned)):
        odd = [v for v in values if not 0 <= v <= _LARGEST]
        if odd:
            raise UserInputError(
                f"{name} holds {odd[0]}, which is no token",
                where=where,
                hint=f"tokens begin at 0; the label {IGNORED} stands for no loss",
            )
    return Example(tuple(tokens), tuple(labels))


def _from_text(row: dict[str, Any], texts: _Texts, where: str) -> Example:
    tokens = texts.ended(texts.whole(row, "text", where))
    return Example(tuple(tokens), tuple(tokens))


def _from_completion(row: dict[str, Any], texts: _Texts, where: str) -> Example:
    prompt, completion = (_string(row, key, where) for key in ("prompt", "completion"))
    tokens, begin = texts.joint(prompt, completion, where)
    if begin == len(tokens):
        return Example((), ())
    tokens = texts.ended(tokens)
    return Example(tuple(tokens), (*[IGNORED] * begin, *tokens[begin:]))


def _from_messages(row: dict[str, Any], texts: _Texts, where: str) -> Example:
    """Loss on the assistant's turns, found by rendering the template up to each of them."""
    messages = row["messages"]
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
        for m in messages
    )
    if not valid or not messages:
        raise UserInputError("messages must be a list of {role, content}", where=where)
    if messages[0]["role"] == "assistant":
        raise UserInputError(
            "the chat begins with the assistant, which answers nothing",
            where=where,
            hint="begin with a turn of the user",
        )
    if not getattr(texts.tokenizer, "chat_template", None):
        raise UserInputError(
            "the tokenizer has no chat template", where=where, hint="use prompt and completion"
        )
    tokens: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = texts.render(messages[:index], where, prompt=True)
        after = texts.render(messages[: index + 1], where, prompt=False)
        if after[: len(before)] != before or before[: len(tokens)] != tokens:
            raise UserInputError("the chat template rewrites earlier turns", where=where)
        labels += [IGNORED] * (len(before) - len(labels)) + after[len(before) :]
        tokens = after
    if not tokens:
        raise UserInputError("messages has no assistant turn to learn", where=where)
    return Example(tuple(tokens), tuple(labels))


def _check_characters(text: str, where: str) -> None:
    """See that a text can be written: JSON can name one surrogate alone, half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserInputError(
            f"a text holds half of a character: {error}",
            where=where,
            hint="a code such as \\ud83d needs its second one, \\ude00",
        ) from error


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UserInputError(f"the field {key!r} is missing or no text", where=where)
    return value

"""One row of data as a training example: the form is recognised, and the tokens are cut to fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qalora_compile.config.choices import COMPLETIONS, EVERYTHING, LEARN
from qalora_compile.errors import UserInputError
from qalora_compile.training.data.chats import Chat, ChatReader
from qalora_compile.training.data.example import IGNORED, Example
from qalora_compile.training.data.row_forms import (
    LABELLED,
    PREFERENCE,
    TEXT,
    TOKEN_IDS,
    Form,
    answers_of,
    class_index,
    fields_of,
    recognise,
    string,
)
from qalora_compile.training.data.tokenize import Texts

_CUT_AT_END = (TOKEN_IDS, TEXT, LABELLED)
"""Forms that lose their end if they are too long; the others lose their beginning."""
_LARGEST = 2**31 - 1
"""The limit of token ids: a cache stores 32 bits, and no vocabulary needs more."""


@dataclass(frozen=True)
class Reading:
    """The example of a row, and how it was read.

    Attributes:
        example: The example, cut to fit.
        form: The name of its form.
        cut: Whether it was too long.
        remarks: What else was changed.
    """

    example: Example
    form: str
    cut: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LineReader:
    """Makes examples of rows.

    Attributes:
        tokenizer: Of the model; None if the rows hold token ids.
        max_length: The largest number of tokens of an example (and also for the encoder).
        decoder_start: The token that the decoder of an encoder-decoder model begins with: prompts
            are then for the encoder, completions for the decoder. None: there is no encoder.
        learn: `completions`, or `everything` for loss on prompts, too.
        classes: Class names of a classification task, in the order of the logits; None: the task
            is to predict tokens.
        mapping: Field of a form → field of the data, see `row_forms.read_mapping`; None: the names
            are the same.
        pairs: Whether the rows are pairs of answers, of which one is preferred.
    """

    tokenizer: Any
    max_length: int
    decoder_start: int | None = None
    learn: str = COMPLETIONS
    classes: tuple[str, ...] | None = None
    mapping: Mapping[str, str] | None = None
    pairs: bool = False

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.tokenizer, self.max_length)

    @cached_property
    def _chats(self) -> ChatReader:
        return ChatReader(self._texts)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserInputError(f"max_length is {self.max_length}", hint="use 2 or more")
        if self.learn not in LEARN:
            raise UserInputError(f"learn is {self.learn!r}", hint=f"use one of {', '.join(LEARN)}")
        if self.pairs and (self.learn == EVERYTHING or self.classes is not None):
            raise UserInputError(
                "a loss of preferences compares answers alone",
                hint=f"leave out --learn {EVERYTHING} and --task classification of finetune",
            )

    def check(self, row: Any, where: str) -> bool:
        """Check a row without tokenizing it; returns False if it holds nothing to learn.

        Raises:
            UserInputError: it is malformed.
        """
        fields = fields_of(row, self.mapping, where)
        if self.classes is not None:
            class_index(fields, self.classes, where)
            string(fields, "text", where)
            return True
        rows = answers_of(fields, where) if self.pairs else (fields,)
        useful = [self._check_form(recognise(row, where), where) for row in rows]
        return all(useful)

    def _check_form(self, form: Form, where: str) -> bool:
        if self.decoder_start is not None:
            self._pair_of(form, where)
            return True
        if form.name == TOKEN_IDS:
            return self._read(form, where).example.learns
        self._require_tokenizer(where)
        return form.chat is not None or form.pair is None or bool(form.pair[1].strip())

    def read(self, row: Any, where: str) -> Reading:
        """The example of a row, cut to fit.

        Args:
            row: A JSON value.
            where: File and line.

        Raises:
            UserInputError: the row is malformed.
        """
        fields = fields_of(row, self.mapping, where)
        if self.classes is not None:
            return self._read_labelled(fields, self.classes, where)
        if self.pairs:
            return self._read_answers(fields, where)
        return self._read(recognise(fields, where), where)

    def _read_answers(self, fields: Mapping[str, Any], where: str) -> Reading:
        """Both answers, each read as a completion and cut to fit by itself."""
        chosen, rejected = (
            self._read(recognise(row, where), where) for row in answers_of(fields, where)
        )
        return Reading(
            replace(chosen.example, rejected=rejected.example),
            PREFERENCE,
            cut=chosen.cut or rejected.cut,
            remarks=tuple(dict.fromkeys((*chosen.remarks, *rejected.remarks))),
        )

    def _read(self, form: Form, where: str) -> Reading:
        """The example of a language task, cut to fit."""
        if self.decoder_start is not None:
            reading = self._read_pair(form, self.decoder_start, where)
        else:
            reading = self._read_form(form, where)
        example, limit = reading.example, self.max_length
        if example.length <= limit:
            return reading
        at_end = form.name in _CUT_AT_END or self.decoder_start is not None
        cut = slice(limit) if at_end else slice(-limit, None)
        short = Example(example.tokens[cut], example.labels[cut], example.source[cut])
        return replace(reading, example=short, cut=True)

    def _read_form(self, form: Form, where: str) -> Reading:
        if form.name == TOKEN_IDS:
            return Reading(_from_ids(form.row, where), form.name)
        self._require_tokenizer(where)
        remarks: tuple[str, ...] = ()
        if form.name == TEXT:
            tokens = self._texts.ended(self._texts.encode_field(form.row["text"], "text", where))
            remarks = ("labels are not learned",) if "label" in form.row else ()
            return Reading(Example(tuple(tokens), tuple(tokens)), form.name, remarks=remarks)
        if form.chat is not None and (form.pair is None or self._has_template):
            example, remarks = self._from_chat(form.chat, where)
        else:
            example = self._from_pair(form, where)
        if self.learn == EVERYTHING and example.learns:
            example = Example(example.tokens, example.tokens)
        return Reading(example, form.name, remarks=remarks)

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _require_tokenizer(self, where: str) -> None:
        if self.tokenizer is None:
            raise UserInputError(
                "the model has no tokenizer to read text with",
                where=where,
                hint='give token ids: {"input_ids": […]}, or a model folder with a tokenizer',
            )

    def _from_pair(self, form: Form, where: str) -> Example:
        prompt, completion = form.pair or ("", "")
        tokens, begin = self._texts.joint(prompt, completion, where)
        if begin == len(tokens):
            return Example((), ())
        tokens = self._texts.ended(tokens)
        return Example(tuple(tokens), (*[IGNORED] * begin, *tokens[begin:]))

    def _from_chat(self, chat: Chat, where: str) -> tuple[Example, tuple[str, ...]]:
        rendered = self._chats.render(chat, where)
        tokens, learned = self._texts.marked(rendered.text, rendered.spans, where)
        labels = [t if own else IGNORED for t, own in zip(tokens, learned, strict=True)]
        return Example(tuple(tokens), tuple(labels)), rendered.remarks

    def _read_pair(self, form: Form, decoder_start: int, where: str) -> Reading:
        """Text for the encoder and text for the decoder, each with the tokenizer's end token."""
        prompt, completion = self._pair_of(form, where)
        source = self._texts.encode_field(prompt, "prompt", where)
        target = self._texts.ended(self._texts.encode_field(completion, "completion", where))
        example = Example((decoder_start, *target), (IGNORED, *target), tuple(source))
        return Reading(example, form.name)

    def _pair_of(self, form: Form, where: str) -> tuple[str, str]:
        """The two texts of a row for a model with an encoder."""
        if form.pair is None or self.tokenizer is None:
            raise UserInputError(
                f"a model with an encoder learns text from text, and this row is {form.name}",
                where=where,
                hint='use {"prompt": "…", "completion": "…"}, and a model with a tokenizer',
            )
        return form.pair

    def _read_labelled(
        self, fields: Mapping[str, Any], classes: tuple[str, ...], where: str
    ) -> Reading:
        index = class_index(fields, classes, where)
        self._require_tokenizer(where)
        text = string(fields, "text", where)
        tokens = self._texts.encode_field(text, "text", where)
        cut = len(tokens) > self.max_length
        if cut:  # cut by the tokenizer, which keeps the token that ends a text
            limits = {"truncation": True, "max_length": self.max_length}
            tokens = self._texts.encode(self._texts.head(text, where), where, **limits)
            if len(tokens) <= self._texts.special:
                raise UserInputError(
                    f"{self.max_length} tokens leave no room for the text",
                    where=where,
                    hint="use a larger max_length",
                )
        return Reading(Example(tuple(tokens), (), label=index), LABELLED, cut)


def _from_ids(row: Mapping[str, Any], where: str) -> Example:
    tokens, labels = row["input_ids"], row.get("labels", row["input_ids"])
    valid = all(
        isinstance(values, list) and all(type(v) is int for v in values)  # bool is a subtype of int
        for values in (tokens, labels)
    )
    if not valid or len(tokens) != len(labels):
        raise UserInputError(
            "input_ids and labels must be integer lists of the same length", where=where
        )
    learned = [label for label in labels if label != IGNORED]
    for name, values in (("input_ids", tokens), ("labels", learned)):
        odd = [v for v in values if not 0 <= v <= _LARGEST]
        if odd:
            raise UserInputError(
                f"{name} holds {odd[0]}, which is not a token",
                where=where,
                hint=f"tokens begin at 0; the label {IGNORED} stands for no loss",
            )
    return Example(tuple(tokens), tuple(labels))

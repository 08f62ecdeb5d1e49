"""A language model with what turns texts into its tokens and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.runtime.language_model import LanguageModel, Sampling
from qalora_compile.serving.text_stream import TextStream
from qalora_compile.untrusted.tokenizer import render_chat

_PROBE = "qalora end of turn"


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A language model from an edge folder.

    Attributes:
        model: The graph.
        tokenizer: Its tokenizer.
        encode: Text → the tokens of a prompt, as in training.
        ends: The tokens that end a text.
        sampling: How the folder's `generation_config.json` has tokens chosen.
        ignored: Its entries on sampling that have no effect here.
        where: The folder.
    """

    model: LanguageModel
    tokenizer: Any
    encode: Callable[[str], list[int]]
    ends: frozenset[int]
    sampling: Sampling
    ignored: tuple[str, ...]
    where: str

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation up to the beginning of the next answer.

        Raises:
            UserInputError: there is no chat template, or it does not take the messages.
        """
        if not self.has_template:
            raise UserInputError(
                "the model has no chat template",
                where=self.where,
                hint="continue plain text instead: chat --raw, generate --prompt, or "
                "/v1/completions of serve",
            )
        text = render_chat(self.tokenizer, messages, prompt=True, where=self.where)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def turn_ends(self) -> frozenset[int]:
        """The tokens that end an answer: those of `ends`, and the template's own."""
        if not self.has_template:
            return self.ends
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        text = render_chat(self.tokenizer, messages, prompt=False, where=self.where)
        _, found, rest = text.rpartition(_PROBE)
        after = self.tokenizer(rest, add_special_tokens=False).input_ids if found else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return self.ends | {*[token for token in after if token in special][:1]}

    def room(self, prompt: int, wanted: int | None) -> int:
        """How many tokens may follow a prompt of that many tokens; all that fit if None is wanted.

        Raises:
            UserInputError: they do not fit into the model's context.
        """
        limit = self.model.context_length
        if limit is None:
            return _UNLIMITED if wanted is None else wanted
        if prompt + (wanted or 1) > limit:
            raise UserInputError(
                f"{prompt} tokens and {wanted or 1} new ones are more than the {limit} tokens of "
                "the model's context",
                hint="shorten the text or the conversation, or ask for fewer new tokens",
            )
        return limit - prompt if wanted is None else wanted

    def stream(self) -> TextStream:
        """A stream of text; special tokens are left out."""
        return TextStream(self.tokenizer, skip_special=True)


_UNLIMITED = 1 << 20
"""Tokens of an answer of a model whose context has no limit."""

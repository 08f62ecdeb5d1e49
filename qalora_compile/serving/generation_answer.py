"""Answers of `/v1/chat/completions` and `/v1/completions`, complete or in pieces."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from qalora_compile.serving.job import Piece, TokenLogprob

Json = dict[str, Any]


class AnswerForm(ABC):
    """The JSON of an answer.

    Args:
        tokenizer: Writes the tokens of log-probabilities.
        model: The name of the model.
    """

    prefix: str
    kind: str
    chunk: str

    def __init__(self, tokenizer: Any, model: str) -> None:
        self._tokenizer = tokenizer
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def complete(self, choices: Sequence[Sequence[Piece]], prompt_tokens: int) -> Json:
        """The answer, from the pieces of each choice."""
        count = sum(piece.tokens for pieces in choices for piece in pieces)
        rows = [
            {
                "index": index,
                **self._choice("".join(piece.text for piece in pieces)),
                "logprobs": self._logprobs(pieces),
                "finish_reason": pieces[-1].finish,
            }
            for index, pieces in enumerate(choices)
        ]
        usage = self.usage(prompt_tokens, count)
        return self._head | {"object": self.kind, "choices": rows, "usage": usage}

    def part(self, index: int, piece: Piece) -> Json:
        """One piece of a choice, in a stream."""
        choice = {
            "index": index,
            **self._delta(piece.text),
            "logprobs": self._logprobs([piece]),
            "finish_reason": piece.finish,
        }
        return self._head | {"object": self.chunk, "choices": [choice]}

    def begin(self, index: int) -> Json | None:
        """What precedes the first piece of a choice; None for nothing."""
        return None

    def end(self, prompt_tokens: int, count: int) -> Json:
        """The numbers of tokens, at the end of a stream."""
        usage = self.usage(prompt_tokens, count)
        return self._head | {"object": self.chunk, "choices": [], "usage": usage}

    def usage(self, prompt: int, completion: int) -> Json:
        """Numbers of tokens."""
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _write(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        found = [piece.logprob for piece in pieces if piece.logprob is not None]
        return self._probabilities(found) if found else None

    @abstractmethod
    def _choice(self, text: str) -> Json:
        """The text of a choice."""

    @abstractmethod
    def _delta(self, text: str) -> Json:
        """New text of a choice."""

    @abstractmethod
    def _probabilities(self, found: Sequence[TokenLogprob]) -> Json:
        """The log-probabilities of tokens."""


class ChatForm(AnswerForm):
    """The answer to a conversation."""

    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> Json:
        """The role of the message."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._head | {"object": self.chunk, "choices": [choice]}

    def _choice(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _probabilities(self, found: Sequence[TokenLogprob]) -> Json:
        rows = [
            self._row(each.token, each.logprob)
            | {"top_logprobs": [self._row(*top) for top in each.top]}
            for each in found
        ]
        return {"content": rows, "refusal": None}

    def _row(self, token: int, logprob: float) -> Json:
        text = self._write(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class TextForm(AnswerForm):
    """The continuation of a text."""

    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"

    def _choice(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str) -> Json:
        return {"text": text}

    def _probabilities(self, found: Sequence[TokenLogprob]) -> Json:
        texts = [self._write(each.token) for each in found]
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [
                {self._write(token): logprob for token, logprob in each.top} for each in found
            ],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }

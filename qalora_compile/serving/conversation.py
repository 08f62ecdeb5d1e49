"""A conversation with a language model: history, and one cache for all of its turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from qalora_compile.runtime.language_model import Context, Sampling
from qalora_compile.serving.text_model import TextModel


@dataclass
class Answer:
    """An answer, which is generated as `pieces` are read, and its figures.

    Attributes:
        prompt: Tokens of the history with the new message.
        reused: How many of them had been read for an earlier answer.
        pieces: The text of each new token; "" if a character is not complete yet.
        tokens: New tokens so far.
        first: Seconds to the first of them.
        seconds: Seconds in all.
    """

    prompt: int
    reused: int
    pieces: Generator[str, None, None] = field(init=False)
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first one; None if there was only that."""
        spent = self.seconds - self.first
        return (self.tokens - 1) / spent if self.tokens > 1 and spent > 0 else None


class Conversation:
    """Messages and answers.

    Args:
        model: The model.
        system: Instructions at the beginning.
        raw: Let the model continue the plain text of all messages and answers, for models without a
            chat template.
        sampling: How tokens are chosen.
        max_new_tokens: Largest number of tokens of an answer; None: what the context has left.

    Raises:
        UserInputError: the model has no chat template, and `raw` is not set.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        system: str | None,
        raw: bool,
        sampling: Sampling,
        max_new_tokens: int | None,
    ) -> None:
        self._model, self._raw, self._sampling = model, raw, sampling
        self._limit = max_new_tokens
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._begin)
        self._context = Context(model.model)
        self._ends = model.ends if raw else model.turn_ends()
        if not raw:
            model.chat_tokens([*self._begin, {"role": "user", "content": "a"}])

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self._messages = list(self._begin)

    def ask(self, text: str) -> Answer:
        """Begin the answer to a message; message and answer are then part of the history.

        If reading the pieces ends early, the answer is what was read.

        Raises:
            UserInputError: the history is longer than the model's context; it stays as it was.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = self._tokens(messages)
        count = self._model.room(len(prompt), self._limit)
        rest = self._context.rest(prompt)
        answer = Answer(prompt=len(prompt), reused=len(prompt) - len(rest))
        answer.pieces = self._answer(answer, messages, prompt, count)
        return answer

    def _tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self._raw:
            return self._model.encode("".join(message["content"] for message in messages))
        return self._model.chat_tokens(messages)

    def _answer(
        self, answer: Answer, messages: list[dict[str, str]], prompt: list[int], count: int
    ) -> Generator[str, None, None]:
        turn = len(messages)  # the same message again gets another answer
        sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + turn)
        stream, pieces, begin = self._model.stream(), [""], time.monotonic()
        tokens = self._model.model.generate(
            prompt,
            max_new_tokens=count,
            stop=list(self._ends),
            sampling=sampling,
            context=self._context,
        )
        try:
            for token in tokens:
                answer.tokens += 1
                answer.seconds = time.monotonic() - begin
                answer.first = answer.first or answer.seconds
                pieces.append(stream.add(token))
                yield pieces[-1]
        finally:
            answer.seconds = time.monotonic() - begin
            self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

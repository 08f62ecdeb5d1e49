"""One text to continue, and what is known of it while it is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qalora_compile.runtime.language_model import Context, Sampling, choose_token
from qalora_compile.serving.text_model import TextModel
from qalora_compile.serving.text_stream import StopStrings

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST = -9999.0
STOP, LENGTH = "stop", "length"
"""Why a text ended: at a stop token or string, or at its limit."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its logarithmic probability, and the likeliest ones in its place.

    Attributes:
        token: The token.
        logprob: Natural logarithm of its probability, before temperature.
        top: The likeliest tokens with theirs, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to a text.

    Attributes:
        text: New text; "" if a character or a stop string is not complete yet.
        tokens: New tokens of the text: 1, or 0 for a stop token.
        logprob: The probabilities of the token, if they were asked for.
        finish: `stop` or `length` if the text has ended; None before.
        error: What went wrong; the text has ended.
    """

    text: str = ""
    tokens: int = 1
    logprob: TokenLogprob | None = None
    finish: str | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass(frozen=True, kw_only=True)
class Order:
    """A text to continue.

    Attributes:
        prompt: Its tokens.
        max_tokens: Largest number of new tokens, at least 1.
        ends: Tokens that end the text, unseen.
        stop: Strings that end the text, unseen.
        sampling: How tokens are chosen.
        logprobs: How many of the likeliest tokens are reported with each; None: not even its own.
    """

    prompt: Sequence[int]
    max_tokens: int
    ends: frozenset[int]
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None


class Job:
    """An order that is being carried out.

    Args:
        model: The model.
        order: What to generate.
        send: Called with every piece.
    """

    def __init__(self, model: TextModel, order: Order, send: Callable[[Piece], None]) -> None:
        self.order, self.send = order, send
        self.context = Context(model.model)
        self.unread = list(order.prompt)
        """Tokens that the model has not read: of the prompt, or the last one that was chosen."""
        self.done = self.cancelled = False
        self._stream, self._stops = model.stream(), StopStrings(order.stop)
        self._generator = np.random.default_rng(order.sampling.seed)
        self._seen = set(order.prompt)
        self._count = 0

    def take(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token from logits `[V]`, and send what it adds."""
        token = choose_token(logits, self.order.sampling, self._generator, self._seen)
        self._seen.add(token)
        self._count += 1
        if token in self.order.ends:
            self._finish(Piece(self._stops.rest(), tokens=0, finish=STOP))
            return
        text = self._stops.add(self._stream.add(token))
        piece = Piece(text, logprob=self._logprob(logits, token))
        if self._stops.found:
            self._finish(dataclasses.replace(piece, finish=STOP))
        elif self._count >= self.order.max_tokens:
            piece = dataclasses.replace(piece, text=text + self._stops.rest(), finish=LENGTH)
            self._finish(piece)
        else:
            self.unread = [token]
            self.send(piece)

    def fail(self, error: Exception) -> None:
        """End the text by an error."""
        self._finish(Piece(tokens=0, error=error))

    def _finish(self, piece: Piece) -> None:
        self.done = True
        self.send(piece)

    def _logprob(self, logits: NDArray[np.float32], token: int) -> TokenLogprob | None:
        wanted = self.order.logprobs
        if wanted is None:
            return None
        exact = logits.astype(np.float64)
        exact -= exact.max()
        exact = np.maximum(exact - np.log(np.exp(exact).sum()), _LEAST)  # JSON has no infinity
        best = np.argsort(-exact, kind="stable")[:wanted]
        top = tuple((int(each), float(exact[each])) for each in best)
        return TokenLogprob(token, float(exact[token]), top)

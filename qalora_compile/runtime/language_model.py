"""Token generation with an exported language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.decoder import Decoder
from qalora_compile.runtime.session import run_values

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TOKENS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"
_PAST, _PRESENT, _LOGITS = "past_key_values.", "present.", "logits"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (greedy).
        top_p: Sample from the smallest set of tokens with this much probability together.
        top_k: Sample from this many of the likeliest tokens at most; 0: no limit.
        seed: Seed of the sampling.
        repetition_penalty: By what the logits of tokens that the text already has are divided, or
            multiplied where they are negative (arXiv 1909.05858); greedy choices are made of these
            logits too. 1: not at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise UserInputError(
                f"temperature is {self.temperature} and top_p is {self.top_p}",
                hint="use temperature 0 or more and top_p in (0, 1]",
            )
        if self.top_k < 0 or self.seed < 0:
            raise UserInputError(
                f"top_k is {self.top_k} and seed is {self.seed}", hint="use 0 or more"
            )
        if not 0 < self.repetition_penalty < math.inf:
            raise UserInputError(
                f"repetition_penalty is {self.repetition_penalty}", hint="use a number above 0"
            )


class LanguageModel:
    """A causal language model exported with a key-value cache, or as one full-sequence forward.

    Args:
        session: From `open_session`; takes `input_ids` and, if they were exported,
            `attention_mask`, `position_ids`, `past_key_values.N.key` and `past_key_values.N.value`.
        context_length: Largest number of tokens, prompt and answer together; None: no limit.

    Raises:
        UnsupportedError: the model takes other inputs, or gives no logits `[B, T, V]`.
    """

    def __init__(self, session: Any, *, context_length: int | None = None) -> None:
        self.session = session
        self.context_length = context_length
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        self._outputs = outputs = {o.name: o for o in session.get_outputs()}
        self.logits_name = _LOGITS if _LOGITS in outputs else next(iter(outputs), "nothing")
        unknown = set(self._inputs) - {_TOKENS, _MASK, _POSITIONS, *self._past}
        known = self.logits_name in outputs and len(outputs[self.logits_name].shape) == 3
        if unknown or not known or _TOKENS not in self._inputs:
            raise UnsupportedError(
                f"the model takes {', '.join(self._inputs)} and gives {self.logits_name}: it is "
                "not a causal language model exported by this package",
            )

    @property
    def cached(self) -> bool:
        """Whether the model has a key-value cache."""
        return bool(self._past)

    @property
    def masked(self) -> bool:
        """Whether the model takes an attention mask."""
        return _MASK in self._inputs

    @property
    def gives_last(self) -> bool:
        """Whether the model outputs the logits of the last token alone."""
        return bool(self._outputs[self.logits_name].shape[1] == 1)

    def empty_cache(self, batch: int = 1) -> dict[str, Any]:
        """A cache of 0 tokens, by input name, as `onnxruntime.OrtValue`."""
        return empty_cache(self._inputs, self._past, batch)

    def step(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        cache: Mapping[str, Any],
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Logits of tokens that follow those in the cache, and the extended cache.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, past + T]`, 0 for padding. Positions count only tokens with mask 1.
            cache: From `empty_cache` or an earlier step.

        Returns:
            Logits `[B, T, V]` (`[B, 1, V]` if the model was exported with the last ones only) and
            cache.
        """
        values = self.feed(input_ids, attention_mask)
        present = [self.present_of(name) for name in self._past]
        found = run_values(self.session, [self.logits_name, *present], {**values, **cache})
        logits: NDArray[np.float32] = found[0].numpy()
        return logits, dict(zip(self._past, found[1:], strict=True))

    def feed(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
    ) -> dict[str, Any]:
        """The inputs of a step without its cache, by name, as `onnxruntime.OrtValue`."""
        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        positions = (attention_mask.cumsum(-1) - 1).clip(0)[:, -input_ids.shape[1] :]
        feed = {_TOKENS: input_ids, _MASK: attention_mask, _POSITIONS: positions}
        return {
            name: runtime.OrtValue.ortvalue_from_numpy(value)
            for name, value in feed.items()
            if name in self._inputs
        }

    @staticmethod
    def present_of(past: str) -> str:
        """The output that extends an input of the cache."""
        return past.replace(_PAST, _PRESENT)

    def logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits `[B, T, V]` float32 of token ids `[B, T]` int64; no mask means all ones.

        A model that outputs the logits of the last token alone reads one token after the other.
        """
        import numpy as np

        mask = attention_mask if attention_mask is not None else input_ids * 0 + 1
        cache, length = self.empty_cache(len(input_ids)), input_ids.shape[1]
        if not self.gives_last:
            return self.step(input_ids, mask, cache)[0]
        parts = []
        for end in range(1, length + 1):
            fresh = input_ids[:, end - 1 if self.cached else 0 : end]
            found, cache = self.step(fresh, mask[:, :end], cache)
            parts.append(found)
        return np.concatenate(parts, axis=1)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        sampling: Sampling | None = None,
        context: Context | None = None,
    ) -> Iterator[int]:
        """Yield new tokens one by one, until a stop token (not yielded) or the limit.

        Without a key-value cache, each token runs the entire sequence again.

        Args:
            prompt: Token ids.
            max_new_tokens: The limit.
            stop: Tokens that end the generation.
            sampling: How a token is chosen; None takes the likeliest.
            context: What the model has read before: of a prompt that begins with the same tokens,
                only the rest is read. It is extended by the prompt and the new tokens.

        Raises:
            UserInputError: the prompt is empty, or it exceeds the context together with its answer.
        """
        sampling = sampling or Sampling()
        if not prompt:
            raise UserInputError("the prompt has no tokens")
        if self.context_length is not None and len(prompt) + max_new_tokens > self.context_length:
            raise UserInputError(
                f"{len(prompt)} tokens of the prompt and {max_new_tokens} new ones are more than "
                f"the {self.context_length} tokens of the model's context",
                hint="ask for fewer new tokens, or shorten the prompt",
            )
        context = Context(self) if context is None else context
        rest = context.rest(prompt)
        return continue_tokens(context.read, rest, max_new_tokens, stop, sampling, text=prompt)


class Context:
    """The tokens that a model has read, with their key-value cache.

    Args:
        model: The model; without a cache, every call of `read` reads all tokens again.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.tokens: list[int] = []
        self._decoder = Decoder(model) if model.cached else None

    def clear(self) -> None:
        """Forget all tokens."""
        self._keep(0)

    @property
    def cache(self) -> dict[str, Any]:
        """The cache of the tokens, for `LanguageModel.step`; empty for a model without one."""
        return {} if self._decoder is None else self._decoder.cache

    def read(self, fresh: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens, at least one, after the others; returns the logits `[V]` after them."""
        last: NDArray[np.float32] = self._read(fresh)[-1]
        return last

    def read_each(self, fresh: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens, at least one, after the others; returns the logits `[n, V]` after each."""
        import numpy as np

        if self.model.gives_last:
            return np.stack([self.read([token]) for token in fresh])
        return self._read(fresh)[-len(fresh) :]

    def _read(self, fresh: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; returns the logits of one step."""
        import numpy as np

        tokens = [*self.tokens, *fresh]
        if self._decoder is None:
            ids = np.array([tokens], dtype=np.int64)
            logits, _ = self.model.step(ids, np.ones_like(ids), {})
        else:
            logits = self._decoder.read(np.array([list(fresh)], dtype=np.int64))
        self.tokens = tokens
        found: NDArray[np.float32] = logits[0]
        return found

    def rest(self, prompt: Sequence[int]) -> list[int]:
        """Forget what a prompt does not begin with; returns its tokens that are still to read.

        The last token is always read again, because its logits are needed.
        """
        pairs = enumerate(zip(self.tokens, prompt, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(self.tokens), len(prompt)))
        self._keep(min(same, len(prompt) - 1))
        return list(prompt[len(self.tokens) :])

    def _keep(self, count: int) -> None:
        """Keep the first tokens only; none if the cache is of others, as after an interruption."""
        if self._decoder is not None:
            kept = count if self._decoder.count == len(self.tokens) else 0
            count = self._decoder.keep(kept)
        self.tokens = self.tokens[:count]


def empty_cache(inputs: Mapping[str, Any], names: Sequence[str], batch: int) -> dict[str, Any]:
    """A cache of 0 tokens for the inputs `names` of a session, as `OrtValue`.

    Raises:
        UnsupportedError: an input is not a cache `[B, heads, tokens, width]`.
    """
    import numpy as np

    runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
    cache = {}
    for name in names:
        value = inputs[name]
        shape = value.shape
        if len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape[1::2]):
            raise UnsupportedError(f"the input {name} is {shape}, not a cache of keys or values")
        dtype = np.float16 if value.type == "tensor(float16)" else np.float32
        empty = np.zeros((batch, shape[1], 0, shape[3]), dtype)
        cache[name] = runtime.OrtValue.ortvalue_from_numpy(empty)
    return cache


def continue_tokens(
    step: Callable[[list[int]], NDArray[np.float32]],
    prompt: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[int],
    sampling: Sampling,
    *,
    text: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield new tokens; `step` takes the tokens since its last call and returns logits `[V]`.

    Args:
        step: The model.
        prompt: The tokens that it has not read.
        max_new_tokens: The limit.
        stop: Tokens that end the generation.
        sampling: How a token is chosen.
        text: All tokens so far, the prompt's included; None: the prompt's.
    """
    import numpy as np

    generator = np.random.default_rng(sampling.seed)
    fresh, seen = list(prompt), set(prompt if text is None else text)
    for _ in range(max_new_tokens):
        token = choose_token(step(fresh), sampling, generator, seen)
        if token in stop:
            return
        seen.add(token)
        fresh = [token]
        yield token


def choose_token(
    logits: NDArray[np.float32],
    sampling: Sampling,
    generator: np.random.Generator,
    seen: Collection[int] = (),
) -> int:
    """The next token from logits `[V]`: greedy, or nucleus sampling (arXiv 1904.09751).

    `seen` are the tokens of the text, to which a `repetition_penalty` applies.
    """
    import numpy as np

    if sampling.repetition_penalty != 1 and seen:
        logits, known = logits.copy(), np.fromiter(seen, np.int64, len(seen))
        own, penalty = logits[known], np.float32(sampling.repetition_penalty)
        logits[known] = np.where(own < 0, own * penalty, own / penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    exact = logits.astype(np.float64)
    probabilities = np.exp((exact - exact.max()) / sampling.temperature)
    order = np.argsort(-exact)[: sampling.top_k or None]
    probabilities /= probabilities[order].sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < sampling.top_p]
    weights = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=weights))

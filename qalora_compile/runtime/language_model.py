"""Token generation with an exported language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.session import run_values, shares_cache
from qalora_compile.untrusted import quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TOKENS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"
_ROOM = 256
"""Tokens by which the buffers of a cache grow, at least."""
_PAST, _PRESENT, _LOGITS = "past_key_values.", "present.", "logits"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (greedy).
        top_p: Sample from the smallest set of tokens with this much probability together.
        seed: Seed of the sampling.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserInputError(
                f"temperature is {self.temperature} and top_p is {self.top_p}",
                hint="use temperature 0 or more and top_p in (0, 1]",
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
        outputs = {o.name: o for o in session.get_outputs()}
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
        """Logits `[B, T, V]` float32 of token ids `[B, T]` int64; no mask means all ones."""
        mask = attention_mask if attention_mask is not None else input_ids * 0 + 1
        return self.step(input_ids, mask, self.empty_cache(len(input_ids)))[0]

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Yield new tokens one by one, until a stop token (not yielded) or the limit.

        Without a key-value cache, each token runs the entire sequence again.

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
        return self._generate(prompt, max_new_tokens, stop, sampling)

    def _generate(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int], sampling: Sampling
    ) -> Iterator[int]:
        import numpy as np

        decoder = Decoder(self) if self.cached else None
        tokens: list[int] = []

        def step(fresh: list[int]) -> NDArray[np.float32]:
            tokens.extend(fresh)
            read = self.logits if decoder is None else decoder.read
            logits = read(np.array([tokens if decoder is None else fresh], dtype=np.int64))
            last: NDArray[np.float32] = logits[0, -1]
            return last

        return continue_tokens(step, prompt, max_new_tokens, stop, sampling)


class Decoder:
    """Reads tokens call by call, and keeps the cache of those before in place.

    A model of target `ort` with the operator library appends to buffers that have room for more
    tokens. Other models copy the cache in each step, as `LanguageModel.step` does.

    Args:
        model: With a key-value cache.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._cache = model, dict[str, Any](model.empty_cache())
        self._shares = shares_cache(model.session)
        self._count = self._room = 0
        self._binding: Any = None

    def read(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits `[1, T, V]` (`[1, 1, V]` of the last alone) of the next tokens `[1, T]`.

        Raises:
            UserInputError: ONNX Runtime cannot run the model on them.
        """
        import numpy as np

        before, self._count = self._count, self._count + input_ids.shape[1]
        mask = np.ones((1, self._count), np.int64)
        if not self._shares:
            logits, self._cache = self._model.step(input_ids, mask, self._cache)
            return logits
        if self._count > self._room:
            self._grow(before)
        return self._append(self._model.feed(input_ids, mask))

    def _append(self, feed: Mapping[str, Any]) -> NDArray[np.float32]:
        binding = self._binding
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._model.logits_name)  # the last, and anew: its shape may change
        try:
            self._model.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise UserInputError(
                f"ONNX Runtime cannot run the model: {quoted(str(error), 300)}",
                hint="export it again; if that does not help, it is a bug of the exporter",
            ) from error
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return logits

    def _grow(self, count: int) -> None:
        """Buffers with room for twice as many tokens, and the first `count` of the cache."""
        import numpy as np

        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        make = runtime.OrtValue.ortvalue_from_shape_and_type  # aligned, unlike numpy's memory
        self._room = max(2 * count, self._count) + _ROOM
        self._binding = self._model.session.io_binding()
        for name, kept in self._cache.items():
            batch, heads, _, width = kept.shape()
            buffer = make([batch, heads, self._room, width], np.float32, "cpu")
            if count:
                grown = np.zeros((batch, heads, self._room, width), np.float32)
                grown[:, :, :count] = kept.numpy()[:, :, :count]
                buffer.update_inplace(grown)
            self._cache[name] = buffer
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(self._model.present_of(name), buffer)


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
) -> Iterator[int]:
    """Yield new tokens; `step` takes the tokens since its last call and returns logits `[V]`."""
    import numpy as np

    generator = np.random.default_rng(sampling.seed)
    fresh = list(prompt)
    for _ in range(max_new_tokens):
        token = choose_token(step(fresh), sampling, generator)
        if token in stop:
            return
        fresh = [token]
        yield token


def choose_token(
    logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator
) -> int:
    """The next token from logits `[V]`: greedy, or nucleus sampling (arXiv 1904.09751)."""
    import numpy as np

    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < sampling.top_p]
    weights = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=weights))

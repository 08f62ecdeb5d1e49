"""`Decoder`: reads tokens call by call, and keeps the cache of those before in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.session import shares_cache
from qalora_compile.untrusted import quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ROOM = 256
"""Tokens by which the buffers of a cache grow, at least."""


class CachedModel(Protocol):
    """The parts of a `LanguageModel` with a key-value cache that a decoder needs."""

    session: Any
    logits_name: str

    def empty_cache(self, batch: int = 1) -> dict[str, Any]:
        """See `LanguageModel.empty_cache`."""

    def step(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        cache: Mapping[str, Any],
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """See `LanguageModel.step`."""

    def feed(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
    ) -> dict[str, Any]:
        """See `LanguageModel.feed`."""

    def present_of(self, past: str) -> str:
        """See `LanguageModel.present_of`."""


class Decoder:
    """Reads tokens call by call, and keeps the cache of those before in place.

    A model of target `ort` with the operator library appends to buffers that have room for more
    tokens. Other models copy the cache in each step, as `LanguageModel.step` does.

    Attributes:
        count: Number of tokens in the cache.

    Args:
        model: With a key-value cache.
    """

    def __init__(self, model: CachedModel) -> None:
        self._model, self._shares = model, shares_cache(model.session)
        self._empty()

    def _empty(self) -> None:
        self._cache: dict[str, Any] = self._model.empty_cache()
        self.count = self._room = 0
        self._binding: Any = None

    @property
    def cache(self) -> dict[str, Any]:
        """The cache of exactly `count` tokens, as `LanguageModel.step` takes it."""
        return self._cut(self.count) if self._shares else self._cache

    def read(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits `[1, T, V]` (`[1, 1, V]` of the last alone) of the next tokens `[1, T]`.

        Raises:
            UserInputError: ONNX Runtime cannot run the model on them.
        """
        import numpy as np

        count = self.count + input_ids.shape[1]
        mask = np.ones((1, count), np.int64)
        if self._shares:
            if count > self._room:
                self._grow(count)
            logits = self._append(self._model.feed(input_ids, mask))
        else:
            logits, self._cache = self._model.step(input_ids, mask, self._cache)
        self.count = count
        return logits

    def keep(self, count: int) -> int:
        """Forget all tokens but the first `count`; returns how many are kept.

        None are kept if a layer's cache does not have all of them, as with a sliding window.
        """
        if count >= self.count:
            return self.count
        whole = all(value.shape()[2] == self.count for value in self._cache.values())
        if count == 0 or not (self._shares or whole):
            self._empty()
        elif not self._shares:
            self._cache = self._cut(count)
        self.count = count if self.count else 0
        return self.count

    def _cut(self, count: int) -> dict[str, Any]:
        """The first `count` tokens of the cache."""
        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        cut = runtime.OrtValue.ortvalue_from_numpy
        return {n: cut(value.numpy()[:, :, :count].copy()) for n, value in self._cache.items()}

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
        """Buffers with room for twice as many tokens as before, and for `count` at least."""
        import numpy as np

        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        make = runtime.OrtValue.ortvalue_from_shape_and_type  # aligned, unlike numpy's memory
        self._room = max(2 * self.count, count) + _ROOM
        self._binding = self._model.session.io_binding()
        for name, kept in self._cache.items():
            batch, heads, _, width = kept.shape()
            buffer = make([batch, heads, self._room, width], np.float32, "cpu")
            if self.count:
                grown = np.zeros((batch, heads, self._room, width), np.float32)
                grown[:, :, : self.count] = kept.numpy()[:, :, : self.count]
                buffer.update_inplace(grown)
            self._cache[name] = buffer
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(self._model.present_of(name), buffer)

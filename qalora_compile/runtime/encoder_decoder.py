"""Token generation with an exported encoder-decoder model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.language_model import Sampling, continue_tokens, empty_cache
from qalora_compile.runtime.session import open_session, run_values
from qalora_compile.untrusted.artifacts import (
    DECODER_FILE,
    ENCODER_FILE,
    MERGED_FILE,
    encoder_decoder_files,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TOKENS, _MASK, _DECODER_MASK = "input_ids", "attention_mask", "encoder_attention_mask"
_PAST, _PRESENT, _LOGITS = "past_key_values.", "present.", "logits"
_CROSS = ".encoder."
_STATES, _LAST_STATES = "encoder_hidden_states", "last_hidden_state"


def _fixed(size: object) -> bool:
    """Whether a dimension of a session is a number, and not a name."""
    return isinstance(size, int)


@dataclass(frozen=True)
class Encoded:
    """An encoded input: the inputs of the decoder that stay constant in all steps.

    Attributes:
        values: Keys and values of cross-attention, or the encoder's states where the decoder is
            merged, and the mask, by name of the decoder's input, as `onnxruntime.OrtValue`.
        batch: The batch size.
    """

    values: Mapping[str, Any]
    batch: int


class EncoderDecoder:
    """An encoder-decoder model exported as two graphs.

    Args:
        encoder: Session of `encoder_model.onnx`, from `open_session`.
        decoder: Session of `decoder_model.onnx`, or of `decoder_model_merged.onnx`, whose cache
            holds the keys and values of cross-attention too.
        start: Tokens that the decoder begins with; empty if the model names none.
        context_length: Largest number of tokens of the decoder, including `start`; None: no limit.

    Raises:
        UnsupportedError: the sessions are not two such graphs, or belong to different models.
    """

    def __init__(
        self,
        encoder: Any,
        decoder: Any,
        *,
        start: Sequence[int] = (),
        context_length: int | None = None,
    ) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.start, self.context_length = tuple(start), context_length
        self._encoder_inputs = [i.name for i in encoder.get_inputs()]
        self._inputs = {i.name: i for i in decoder.get_inputs()}
        past = [name for name in self._inputs if name.startswith(_PAST)]
        if _STATES in self._inputs:
            self._encoded = {_STATES: _LAST_STATES}
        else:
            self._encoded = {n: n.replace(_PAST, _PRESENT) for n in past if _CROSS in n}
        self._past = [name for name in past if name not in self._encoded]
        given = {o.name: o for o in encoder.get_outputs()}
        known = {_TOKENS, _DECODER_MASK, *self._past, *self._encoded}
        taken = set(self._encoded.values())
        if not taken or not taken <= set(given) or not set(self._inputs) <= known:
            raise UnsupportedError(
                f"the decoder takes {', '.join(self._inputs)}, and the encoder gives "
                f"{', '.join(given)}: they are not the two graphs of one model",
            )
        for name, output in self._encoded.items():
            mine, theirs = self._inputs[name].shape, given[output].shape
            if any(a != b for a, b in zip(mine, theirs, strict=True) if _fixed(a) and _fixed(b)):
                raise UnsupportedError(
                    f"the decoder takes {name} of sizes {mine}, and the encoder gives {theirs}: "
                    "they belong to different models"
                )

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        library: bool | None = None,
        start: Sequence[int] = (),
        context_length: int | None = None,
    ) -> EncoderDecoder:
        """Open a folder written by `export`; for `threads` and `library`, see `open_session`.

        Raises:
            UserInputError: a file is missing or broken.
            UnsupportedError: see the class; or the folder is for OpenVINO.
        """
        files = encoder_decoder_files(Path(folder))
        if files is None:
            raise UserInputError(
                "the folder holds no encoder-decoder model",
                where=str(folder),
                hint=f"it has {ENCODER_FILE} and {DECODER_FILE}, or {MERGED_FILE}",
            )
        if files[0].suffix == ".xml":
            raise UnsupportedError(
                "the folder is for OpenVINO",
                where=str(folder),
                hint="run it with OpenVINO (docs/design/lowering.md), or export with target ort",
            )
        encoder, decoder = (open_session(file, threads=threads, library=library) for file in files)
        return cls(encoder, decoder, start=start, context_length=context_length)

    @property
    def reads(self) -> bool:
        """Whether the encoder takes tokens rather than audio features."""
        return _TOKENS in self._encoder_inputs

    def encode(self, inputs: Mapping[str, NDArray[Any]]) -> Encoded:
        """Run the encoder, which is needed once per input.

        Args:
            inputs: `input_ids` int64 `[B, T]` and, if there is padding, `attention_mask`; or
                `audio_features` (merged: `input_features`) float32 `[B, mel bins, frames]`.

        Raises:
            UserInputError: an input is missing or unknown.
        """
        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        feed = dict(inputs)
        if _MASK in self._encoder_inputs and _TOKENS in feed:
            feed.setdefault(_MASK, feed[_TOKENS] * 0 + 1)
        if set(feed) != set(self._encoder_inputs):
            raise UserInputError(
                f"the inputs are {', '.join(feed) or 'none'}",
                hint=f"the encoder takes {', '.join(self._encoder_inputs)}",
            )
        batch = len(next(iter(feed.values())))
        values = {n: runtime.OrtValue.ortvalue_from_numpy(value) for n, value in feed.items()}
        found = run_values(self.encoder, list(self._encoded.values()), values)
        kept = dict(zip(self._encoded, found, strict=True))
        if _DECODER_MASK in self._inputs:
            kept[_DECODER_MASK] = values[_MASK]
        return Encoded(kept, batch)

    def empty_cache(self, batch: int = 1) -> dict[str, Any]:
        """The decoder's cache of 0 tokens, by input name, as `onnxruntime.OrtValue`."""
        return empty_cache(self._inputs, self._past, batch)

    def step(
        self, input_ids: NDArray[np.int64], encoded: Encoded, cache: Mapping[str, Any]
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Logits `[B, T, V]` of tokens that follow those in the cache, and the extended cache.

        Args:
            input_ids: The decoder's new tokens, `[B, T]`.
            encoded: From `encode`.
            cache: From `empty_cache` or an earlier step.
        """
        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        tokens = {_TOKENS: runtime.OrtValue.ortvalue_from_numpy(input_ids)}
        present = [name.replace(_PAST, _PRESENT) for name in self._past]
        feed = {**tokens, **encoded.values, **cache}
        found = run_values(self.decoder, [_LOGITS, *present], feed)
        logits: NDArray[np.float32] = found[0].numpy()
        return logits, dict(zip(self._past, found[1:], strict=True))

    def generate(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        max_new_tokens: int,
        prompt: Sequence[int] | None = None,
        stop: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Yield new tokens one by one, until a stop token (not yielded) or the limit.

        Args:
            inputs: A single input, see `encode`.
            max_new_tokens: The limit.
            prompt: Tokens that the decoder begins with; None: `start`. For Whisper, they set the
                language, the task and whether it writes timestamps.
            stop: Tokens that end the generation.
            sampling: How a token is chosen; None takes the likeliest.

        Raises:
            UserInputError: there is no token to begin with, there is more than one input, or more
                tokens are asked for than the model's limit.
        """
        import numpy as np

        begin = list(self.start if prompt is None else prompt)
        if not begin:
            raise UserInputError(
                "the model names no token that its decoder begins with",
                hint="give a prompt, or set decoder_start_token_id in config.json and export again",
            )
        limit = self.context_length
        if limit is not None and len(begin) + max_new_tokens > limit:
            raise UserInputError(
                f"{len(begin)} tokens to begin with and {max_new_tokens} new ones are more than "
                f"the {limit} tokens of the model's context",
                hint="ask for fewer new tokens",
            )
        encoded, cache = self.encode(inputs), self.empty_cache()
        if encoded.batch != 1:
            raise UserInputError(
                f"{encoded.batch} inputs were given", hint="generate takes one; step takes several"
            )

        def step(fresh: list[int]) -> NDArray[np.float32]:
            nonlocal cache
            logits, cache = self.step(np.array([fresh], dtype=np.int64), encoded, cache)
            last: NDArray[np.float32] = logits[0, -1]
            return last

        return continue_tokens(step, begin, max_new_tokens, stop, sampling or Sampling())

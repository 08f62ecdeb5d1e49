"""Exported encoder-decoder models, compared on complete sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import PAST
from qalora_compile.ir.signature import InputLeaf, Signature
from qalora_compile.untrusted.artifacts import DECODER_FILE, ENCODER_FILE, encoder_decoder_files
from qalora_compile.verify.runners.kv_cache import empty_cache, stops_of
from qalora_compile.verify.runners.onnx_session import OnnxSession
from qalora_compile.verify.runners.openvino_session import OpenvinoSession
from qalora_compile.verify.runners.run import Run, Runner

_PRESENT, _LOGITS = "present.", "logits"
_TOKENS, _DECODER_TOKENS = "input_ids", "decoder_input_ids"
_MASK, _DECODER_MASK = "attention_mask", "encoder_attention_mask"
_AUDIO, _FEATURES = "audio_features", "input_features"
_HIDDEN, _LAST_HIDDEN = "encoder_hidden_states", "encoder_last_hidden_state"
_MERGED_HIDDEN = "last_hidden_state"


class EncoderDecoderRunner:
    """Runs encoder and decoder on complete sequences, as a device does.

    The encoder runs once. The decoder reads a first token, then some more with its cache, then the
    rest in the steps of `verify.runners.kv_cache`. Site values come from a run of the decoder on
    all tokens at once.

    Args:
        folder: Contains encoder and decoder, as `export` writes them.
        library: A library of custom operators for the sessions.

    Raises:
        UserInputError: a file is missing or broken, or the two belong to different models.
    """

    def __init__(self, folder: Path, library: Path | None = None) -> None:
        self.label = f"{folder} with {library.name}" if library else str(folder)
        files = encoder_decoder_files(folder) or (folder / ENCODER_FILE, folder / DECODER_FILE)
        for file in files:
            if not file.is_file():
                raise UserInputError(
                    f"the folder has no {file.relative_to(folder)}",
                    where=str(folder),
                    hint="export the model again",
                )
        for_openvino = files[0].suffix == ".xml"
        self._encoder, self._decoder = (
            OpenvinoSession(file) if for_openvino else OnnxSession(file, library) for file in files
        )
        wanted = set(self._encoded.values())
        if not wanted or not wanted <= set(self._encoder.signature.outputs):
            raise UserInputError(
                "the encoder's outputs do not fit the decoder: they belong to different models",
                where=str(folder),
                hint="export both again, together",
            )
        tokens = next(leaf for leaf in self._decoder.signature.inputs if leaf.name == _TOKENS)
        own = InputLeaf(_DECODER_TOKENS, tokens.dtype, tokens.shape)
        inputs = [
            replace(leaf, name=_FEATURES if leaf.name == _AUDIO else leaf.name)
            for leaf in self._encoder.signature.inputs
        ]
        self.signature = Signature((*inputs, own), (_LOGITS, _LAST_HIDDEN), ())

    @property
    def _merged(self) -> bool:
        """Whether the decoder computes the keys and values of cross-attention."""
        return any(leaf.name == _HIDDEN for leaf in self._decoder.signature.inputs)

    @property
    def _encoded(self) -> dict[str, str]:
        """Input of the decoder → output of the encoder."""
        if self._merged:
            return {_HIDDEN: _MERGED_HIDDEN}
        cross = self._decoder.signature.cross_cache
        return {leaf.name: leaf.name.replace(PAST, _PRESENT) for leaf in cross}

    def meet(self, other: Runner) -> None:
        """Adopt the signature of `other`: its inputs, in its order, and its outputs.

        Raises:
            UserInputError: it takes an input that the exported model does not have.
        """
        known = {leaf.name: leaf for leaf in self.signature.inputs}
        leaves = []
        for leaf in other.signature.inputs:
            if leaf.dtype is not None and leaf.name not in known:
                raise UserInputError(
                    f"{other.label} takes {leaf.name}, which the exported model does not have",
                    hint=f"capture the model with {', '.join(known)}",
                )
            leaves.append(leaf if leaf.dtype is None else known[leaf.name])
        outputs = tuple(n for n in other.signature.outputs if n in (_LOGITS, _LAST_HIDDEN))
        self.signature = Signature(tuple(leaves), outputs, ())

    def run(self, leaves: Sequence[Any]) -> Run:
        """Run the encoder, then the decoder in steps, then both again for their sites."""
        feed = {
            leaf.name: value.detach().numpy()
            for leaf, value in zip(self.signature.inputs, leaves, strict=True)
            if leaf.dtype is not None
        }
        tokens = feed.pop(_DECODER_TOKENS)
        if _FEATURES in feed and not self._merged:
            feed[_AUDIO] = feed.pop(_FEATURES)
        if _TOKENS in feed:
            feed.setdefault(_MASK, feed[_TOKENS] * 0 + 1)
        encoded = self._encoder.outputs(feed)
        constant = {name: encoded[output].numpy() for name, output in self._encoded.items()}
        if _MASK in feed:
            constant[_DECODER_MASK] = feed[_MASK]
        states = encoded[_MERGED_HIDDEN if self._merged else _HIDDEN]
        values = {_LOGITS: self._logits(tokens, constant), _LAST_HIDDEN: states}
        full_feed = {_TOKENS: tokens, **constant, **self._empty(len(tokens))}
        sites = self._encoder.sites(feed) | self._decoder.sites(full_feed)
        return Run({name: values[name] for name in self.signature.outputs}, sites)

    def _logits(self, tokens: Any, constant: dict[str, Any]) -> Tensor:
        """Logits of every token: of the first, of some after it, and then in steps."""
        stops = sorted({0, 1, *stops_of(tokens.shape[1])})
        past, parts = self._empty(len(tokens)), []
        for begin, stop in itertools.pairwise(stops):
            step = {_TOKENS: tokens[:, begin:stop], **constant, **past}
            values = self._decoder.outputs(step)
            parts.append(values.pop(_LOGITS))
            past = {name.replace(_PRESENT, PAST): v.numpy() for name, v in values.items()}
        return torch.cat(parts, dim=1)

    def _empty(self, batch: int) -> dict[str, Any]:
        signature = self._decoder.signature
        return empty_cache(signature.cache if self._merged else signature.own_cache, batch)

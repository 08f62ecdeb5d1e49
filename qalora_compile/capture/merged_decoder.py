"""`capture_plain_encoder`, `capture_merged_decoder`: the two graphs of optimum's interface.

`capture_states_decoder` is that of its interface for OpenVINO.

transformers.js and optimum run an encoder that gives its states alone, and one decoder for the
first step and all later ones, which computes the keys and values of cross-attention itself. Files
of optimum have a branch for each (`use_cache_branch`); neither client asks for it. Here the decoder
takes the states that are not in its cache yet, which are all or none of them, and appends what it
computes from them: no operator has a branch. One more row goes through these products and is
dropped, because ONNX Runtime before 1.32 multiplies no matrix without rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.causal_lm import BATCH, PAST, cache_argument
from qalora_compile.capture.encoder_decoder import (
    ENCODER_SEQUENCE,
    FEATURES,
    TOKENS,
    Layout,
    Past,
    capture_part,
    decoder_example,
    encoder_example,
    encoder_output,
    first_dtype,
)
from qalora_compile.capture.model import AxisNames
from qalora_compile.capture.transformers_internals import filled_pair
from qalora_compile.ir.program import Program
from qalora_compile.ir.torch_internals import state_size

ENCODER_PAST = f"encoder_{PAST}"
_STATES, _MASK = "encoder_hidden_states", "encoder_attention_mask"
_EXAMPLE_PAST = 4
"""Tokens of the encoder that are in the cache in the example: torch takes 0 for a constant."""


def capture_plain_encoder(model: nn.Module) -> Program:
    """Capture the encoder alone.

    ====================  ==============================================================
    `input_ids`           int64 `[batch, encoder_sequence]`; or
    `input_features`      `[batch, mel bins, frames]`, of audio models
    `attention_mask`      int64 `[batch, encoder_sequence]`, 0 where padding; with tokens
    `last_hidden_state`   `[batch, encoder_sequence, width]`
    ====================  ==============================================================

    Args, Raises: see `capture.encoder_decoder.capture_encoder`.
    """
    kwargs, axes = encoder_example(model)

    def read(self: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        found = self.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        return {"last_hidden_state": found.last_hidden_state}

    def listen(self: Any, input_features: Tensor) -> dict[str, Any]:
        return {"last_hidden_state": self.get_encoder()(input_features).last_hidden_state}

    return capture_part(model, listen if FEATURES in kwargs else read, kwargs, axes)


def capture_merged_decoder(model: nn.Module) -> Program:
    """Capture the decoder, which computes the keys and values of cross-attention in its first step.

    =================================  =======================================================
    `input_ids`                        int64 `[batch, sequence]`, the decoder's tokens
    `encoder_attention_mask`           int64 `[batch, encoder_sequence]`; with tokens
    `encoder_hidden_states`            `[batch, encoder_sequence, width]`
    `past_key_values.N.decoder.key`    `[batch, heads, past_sequence, head]`, and `.value`; may
                                       be empty
    `past_key_values.N.encoder.key`    `[batch, heads, encoder_past_sequence, head]`, and
                                       `.value`: empty, or what a step before gave
    `logits`                           `[batch, sequence, vocabulary]`
    `present.N.decoder.key/value`      `[batch, heads, past_sequence + sequence, head]`
    `present.N.encoder.key/value`      `[batch, heads, encoder_sequence, head]`
    =================================  =======================================================

    Args, Raises: see `capture.encoder_decoder.capture_encoder`.
    """
    kwargs, axes = _example(model)
    return capture_part(model, _forward(model, reads=_MASK in kwargs), kwargs, axes)


def capture_states_decoder(model: nn.Module) -> Program:
    """Capture the merged decoder without `past_key_values.N.encoder.*`.

    Each step computes the keys and values of cross-attention from the encoder's states; a runtime
    that holds `present.N.encoder.*` as state does so once.

    Args, Raises: see `capture.encoder_decoder.capture_encoder`.
    """
    kwargs, axes = _example(model)
    for layer in kwargs["past_key_values"]:
        del layer["encoder"]
    axes = {name: of for name, of in axes.items() if ".encoder." not in name}
    return capture_part(model, _forward(model, reads=_MASK in kwargs), kwargs, axes)


def _example(model: nn.Module) -> tuple[dict[str, Any], AxisNames]:
    """The split decoder's inputs, with the encoder's states, of which some are in the cache."""
    layout = Layout.of(model)
    kwargs, named = decoder_example(model, layout)
    past = [
        {
            "decoder": layer["decoder"],
            "encoder": {k: v[:, :, :_EXAMPLE_PAST] for k, v in layer["encoder"].items()},
        }
        for layer in kwargs["past_key_values"]
    ]
    batch = kwargs[TOKENS].shape[0]
    states = torch.zeros(batch, layout.length, layout.width, dtype=first_dtype(model))
    length = {1: ENCODER_SEQUENCE} if _MASK in kwargs else {}
    axes = {name: dict(of) for name, of in named.items()} | {_STATES: {0: BATCH} | length}
    for name in axes:
        if ".encoder." in name:
            axes[name][2] = ENCODER_PAST
    return kwargs | {_STATES: states, "past_key_values": past}, axes


def _forward(model: nn.Module, *, reads: bool) -> Callable[..., Any]:
    base, argument = type(model), cache_argument(model)

    def decode(self: Any, tokens: Tensor, states: Tensor, past: Past, **mask: Tensor) -> Any:
        fresh = states
        if "encoder" in past[0]:
            known = past[0]["encoder"]["key"].shape[2]
            state_size(known <= states.shape[1])
            fresh = torch.cat([states[:, known:], states[:, :1]], 1)
        output = base.forward(
            self,
            encoder_outputs=encoder_output(fresh),
            decoder_input_ids=tokens,
            use_cache=True,
            **{argument: filled_pair(past, grows=True)},
            **mask,
        )
        found = output[argument]
        caches = {"decoder": found.self_attention_cache, "encoder": found.cross_attention_cache}
        present = [
            {
                part: {"key": c.layers[n].keys, "value": c.layers[n].values}
                for part, c in caches.items()
            }
            for n in range(len(past))
        ]
        return {"logits": output.logits, "present": present}

    def after_text(
        self: Any,
        input_ids: Tensor,
        encoder_attention_mask: Tensor,
        encoder_hidden_states: Tensor,
        past_key_values: Past,
    ) -> Any:
        states, mask = encoder_hidden_states, encoder_attention_mask
        return decode(self, input_ids, states, past_key_values, attention_mask=mask)

    def after_features(
        self: Any, input_ids: Tensor, encoder_hidden_states: Tensor, past_key_values: Past
    ) -> Any:
        return decode(self, input_ids, encoder_hidden_states, past_key_values)

    return after_text if reads else after_features

"""`capture_encoder`, `capture_decoder`: an encoder-decoder model as two graphs.

The encoder runs once and also computes the keys and values of every decoder layer's
cross-attention. The decoder takes these as inputs, so that no step computes them again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qalora_compile.capture.causal_lm import (
    BATCH,
    PAST,
    SEQUENCE,
    cache_argument,
    leaf_path,
    no_cache,
    ones,
)
from qalora_compile.capture.export import export_model_graph
from qalora_compile.capture.model import AxisNames, make_program, to_evaluation_module
from qalora_compile.capture.transformers_internals import filled_pair, recording_cache
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.program import Program
from qalora_compile.ir.torch_internals import pytree
from qalora_compile.optional import require

ENCODER_SEQUENCE = "encoder_sequence"
TOKENS, FEATURES, AUDIO = "input_ids", "input_features", "audio_features"
Past = list[dict[str, dict[str, Tensor]]]
_FRAMES_A_POSITION = 2
"""Whisper's second convolution halves the frames."""
_FULL_AXES = {
    TOKENS: {0: BATCH, 1: ENCODER_SEQUENCE},
    "attention_mask": {0: BATCH, 1: ENCODER_SEQUENCE},
    FEATURES: {0: BATCH},
    "decoder_input_ids": {0: BATCH, 1: SEQUENCE},
}
_BATCH_SIZE, _SEQUENCE_SIZE, _PAST_SIZE, _ENCODER_SIZE = 2, 3, 5, 7


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model is a transformers model with an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def capture_encoder(model: nn.Module) -> Program:
    """Capture the encoder and the keys and values of every cross-attention, which run once.

    ===========================  ==============================================================
    `input_ids`                  int64 `[batch, encoder_sequence]`; or
    `audio_features`             `[batch, mel bins, frames]`, of audio models; the name is the
                                 one that ONNX Runtime GenAI asks for
    `attention_mask`             int64 `[batch, encoder_sequence]`, 0 where padding; with tokens
    `encoder_hidden_states`      `[batch, encoder_sequence, width]`
    `present.N.encoder.key/value`  `[batch, heads, encoder_sequence, head]`
    ===========================  ==============================================================

    Tensors have the same names as with `capture_model`; no value of a weight is read.

    Args:
        model: A transformers encoder-decoder model in evaluation mode.

    Raises:
        UnsupportedError: it takes inputs other than tokens or log-mel features, or its cache does
            not consist of keys and values.
        CaptureError: `torch.export` refused the model.
    """
    layers = len(Layout.of(model).encoder)
    kwargs, axes = (
        {AUDIO if name == FEATURES else name: value for name, value in part.items()}
        for part in encoder_example(model)
    )
    return capture_part(model, _encoder_forward(model, layers), kwargs, axes)


def capture_decoder(model: nn.Module) -> Program:
    """Capture the decoder with its cache; one graph runs the first step and all later ones.

    =================================  =======================================================
    `input_ids`                        int64 `[batch, sequence]`, the decoder's tokens
    `encoder_attention_mask`           int64 `[batch, encoder_sequence]`; with tokens
    `past_key_values.N.decoder.key`    `[batch, heads, past_sequence, head]`, and `.value`; may
                                       be empty
    `past_key_values.N.encoder.key`    `[batch, heads, encoder_sequence, head]`, and `.value`:
                                       what the encoder gave
    `logits`                           `[batch, sequence, vocabulary]`
    `present.N.decoder.key/value`      `[batch, heads, past_sequence + sequence, head]`
    =================================  =======================================================

    Args, Raises: see `capture_encoder`.
    """
    layout = Layout.of(model)
    kwargs, axes = decoder_example(model, layout)
    return capture_part(model, _decoder_forward(model, layout), kwargs, axes)


def capture_full_forward(model: nn.Module) -> Program:
    """Capture encoder and decoder as one forward pass of complete sequences, in evaluation mode.

    The model is configured to return no cache.

    Args, Raises: see `capture_encoder`.
    """
    disable_cache(model)
    return capture_part(model, type(model).forward, full_example(model), _FULL_AXES)


def disable_cache(model: nn.Module) -> None:
    """Configure a model and its parts to return no cache by default."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def full_example(model: nn.Module) -> dict[str, Tensor]:
    """Keyword inputs of a forward pass of complete sequences: random tokens or features.

    Raises:
        UnsupportedError: the model takes inputs other than tokens or log-mel features.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config

    def tokens(length: int) -> Tensor:
        size = (_BATCH_SIZE, length)
        return torch.randint(0, config.vocab_size, size, generator=generator)

    kwargs, _ = encoder_example(model)
    if TOKENS in kwargs:
        kwargs[TOKENS] = tokens(_ENCODER_SIZE)
    else:
        noise = torch.randn(kwargs[FEATURES].shape, generator=generator)
        kwargs[FEATURES] = noise.to(kwargs[FEATURES].dtype)
    return {**kwargs, "decoder_input_ids": tokens(_SEQUENCE_SIZE)}


@dataclass(frozen=True)
class Layout:
    """The dimensions of a model's caches.

    Attributes:
        decoder: Heads, width of a key and width of a value in each layer's self-attention.
        encoder: The same for cross-attention, and its length for the example.
        width: Width of the encoder's hidden states.
    """

    decoder: list[tuple[int, int, int]]
    encoder: list[tuple[int, int, int]]
    length: int
    width: int

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Read the dimensions from the caches of a run on one token.

        Raises:
            UnsupportedError: the model returns no such caches.
        """
        kwargs, _ = encoder_example(model)
        try:
            with torch.no_grad():
                output = model(**kwargs, decoder_input_ids=ones((_BATCH_SIZE, 1)), use_cache=True)
            caches = output[cache_argument(model)]
            own, cross = (
                [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
                for cache in (caches.self_attention_cache, caches.cross_attention_cache)
            )
            hidden = output.encoder_last_hidden_state.shape
        except Exception as error:  # the model's own code
            raise no_cache(model, error) from error
        sizes = [[(k[1], k[3], v[3]) for k, v in shapes] for shapes in (own, cross)]
        return cls(sizes[0], sizes[1], cross[0][0][2], hidden[-1])


def capture_part(
    model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], axes: AxisNames
) -> Program:
    """Capture `forward` in place of the model's own, with shared parameters."""
    base = type(model)
    part = copy.copy(model)
    part.__class__ = type(base.__name__, (base,), {"forward": forward})
    shapes = pytree.tree_map_with_path(
        lambda path, _: dict.fromkeys(axes[leaf_path(path)], Dim.DYNAMIC), kwargs
    )
    with torch.no_grad():
        exported = export_model_graph(part, (), kwargs, shapes, [])
    return make_program(model, to_evaluation_module(exported), (), kwargs, axes=axes)


def encoder_example(model: Any) -> tuple[dict[str, Any], AxisNames]:
    """Inputs of the encoder, and their dynamic axes.

    Raises:
        UnsupportedError: it takes neither tokens nor log-mel features.
    """
    kind = getattr(model, "main_input_name", None)
    if kind == TOKENS:
        names = (TOKENS, "attention_mask")
        example = {name: ones((_BATCH_SIZE, _ENCODER_SIZE)) for name in names}
        return example, {name: {0: BATCH, 1: ENCODER_SEQUENCE} for name in names}
    bins = getattr(model.config, "num_mel_bins", None)
    positions = getattr(model.config, "max_source_positions", None)
    if kind == FEATURES and isinstance(bins, int) and isinstance(positions, int):
        shape = (_BATCH_SIZE, bins, _FRAMES_A_POSITION * positions)
        return {FEATURES: torch.zeros(shape, dtype=first_dtype(model))}, {FEATURES: {0: BATCH}}
    raise UnsupportedError(
        f"{type(model).__name__} takes {kind or 'unknown inputs'}",
        hint=f"encoder-decoder models are split where they take {TOKENS} or Whisper's {FEATURES}; "
        "export or quantize this one as one forward, with --no-kv-cache",
    )


def _encoder_forward(model: nn.Module, layers: int) -> Callable[..., Any]:
    """The encoder, and one decoder step for its keys and values; the rest is dead code."""
    base, argument = type(model), cache_argument(model)

    def encode(self: Any, **inputs: Tensor) -> dict[str, Any]:
        batch = next(iter(inputs.values())).shape[0]
        output = base.forward(
            self,
            **inputs,
            decoder_input_ids=torch.zeros(batch, 1, dtype=torch.int64),
            use_cache=True,
            **{argument: recording_cache(layers)},
        )
        cross = output[argument].cross_attention_cache.layers
        return {
            "encoder_hidden_states": output.encoder_last_hidden_state,
            "present": [{"encoder": {"key": c.keys, "value": c.values}} for c in cross],
        }

    def read(self: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        return encode(self, input_ids=input_ids, attention_mask=attention_mask)

    def encode_audio(self: Any, audio_features: Tensor) -> dict[str, Any]:
        return encode(self, input_features=audio_features)

    return read if getattr(model, "main_input_name", None) == TOKENS else encode_audio


def decoder_example(model: nn.Module, layout: Layout) -> tuple[dict[str, Any], AxisNames]:
    """Inputs of three tokens after five past ones; torch treats sizes 0 and 1 as constants."""
    dtype = first_dtype(model)

    def keys_values(sizes: tuple[int, int, int], length: int) -> dict[str, Tensor]:
        heads, *widths = sizes
        shapes = [(_BATCH_SIZE, heads, length, width) for width in widths]
        return {
            name: torch.zeros(shape, dtype=dtype)
            for name, shape in zip(("key", "value"), shapes, strict=True)
        }

    reads = TOKENS in encoder_example(model)[0]
    axes: dict[str, dict[int, str]] = {
        TOKENS: {0: BATCH, 1: SEQUENCE},
        "encoder_attention_mask": {0: BATCH, 1: ENCODER_SEQUENCE},
    }
    for layer in range(len(layout.decoder)):
        for part in ("key", "value"):
            name = f"past_key_values.{layer}"
            axes[f"{name}.decoder.{part}"] = {0: BATCH, 2: PAST}
            # An audio model takes input of one length.
            axes[f"{name}.encoder.{part}"] = {0: BATCH} | ({2: ENCODER_SEQUENCE} if reads else {})
    mask = {"encoder_attention_mask": ones((_BATCH_SIZE, layout.length))} if reads else {}
    past = [
        {"decoder": keys_values(own, _PAST_SIZE), "encoder": keys_values(cross, layout.length)}
        for own, cross in zip(layout.decoder, layout.encoder, strict=True)
    ]
    tokens = {TOKENS: ones((_BATCH_SIZE, _SEQUENCE_SIZE))}
    return {**tokens, **mask, "past_key_values": past}, axes


def encoder_output(hidden: Tensor) -> Any:
    """What a decoder gets from its encoder, in the class that transformers has for it."""
    outputs = require("transformers.modeling_outputs", extra="hf", purpose="capture with a cache")
    # NLLB-MoE reads what no decoder needs
    kind = type("Encoded", (outputs.BaseModelOutput,), {"router_logits": None})
    return kind(last_hidden_state=hidden)


def _decoder_forward(model: nn.Module, layout: Layout) -> Callable[..., Any]:
    """The decoder with its cross-attention's keys and values in the cache."""
    base, argument = type(model), cache_argument(model)

    def decode(self: Any, tokens: Tensor, past: Past, **mask: Tensor) -> dict[str, Any]:
        keys = past[0]["encoder"]["key"]
        # Only its length matters: the keys and values computed from it are in the cache.
        hidden = keys.new_zeros(keys.shape[0], keys.shape[2], layout.width)
        output = base.forward(
            self,
            encoder_outputs=encoder_output(hidden),
            decoder_input_ids=tokens,
            use_cache=True,
            **{argument: filled_pair(past)},
            **mask,
        )
        layers = output[argument].self_attention_cache.layers
        present = [{"decoder": {"key": c.keys, "value": c.values}} for c in layers]
        return {"logits": output.logits, "present": present}

    def after_text(
        self: Any, input_ids: Tensor, encoder_attention_mask: Tensor, past_key_values: Past
    ) -> dict[str, Any]:
        return decode(self, input_ids, past_key_values, attention_mask=encoder_attention_mask)

    def after_features(self: Any, input_ids: Tensor, past_key_values: Past) -> dict[str, Any]:
        return decode(self, input_ids, past_key_values)

    return after_text if getattr(model, "main_input_name", None) == TOKENS else after_features


def first_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter, which its inputs have too."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

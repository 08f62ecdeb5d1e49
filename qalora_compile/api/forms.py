"""The same program captured in another form: with a cache, packed, or as two graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.errors import PreconditionError
from qalora_compile.ir.program import Program
from qalora_compile.passes.recipes.replay import replay, replay_part

if TYPE_CHECKING:
    from torch import nn


def add_kv_cache(
    program: Program, model: nn.Module | str | Path, *, last_logits: bool | None = False
) -> Program:
    """The same trained language model as a graph with a key-value cache, for deployment.

    A program trains on complete sequences; a device generates token by token. The model is captured
    again with its cache as inputs and outputs (see `capture.causal_lm`), the passes that made
    `program` are run again on that graph, and the tensors of `program` are put in.

    Args:
        program: At any stage before lowering, made from a transformers decoder-only model by
            `capture_model`.
        model: That model, or a folder with its `config.json`. No weight of it is read.
        last_logits: Output the logits of the last position only; None: if the model can leave out
            the others.

    Raises:
        PreconditionError: `program` was made from another model.
        UnsupportedError: the model has no key-value cache, or is not from transformers.
        CaptureError: `torch.export` refused the model.
    """
    from qalora_compile.capture.causal_lm import capture_causal_lm
    from qalora_compile.capture.skeleton import as_skeleton

    return replay(program, capture_causal_lm(as_skeleton(model), last_logits=last_logits))


def packed_form(program: Program, model: nn.Module | str | Path, *, max_length: int) -> Program:
    """The same language model, over the same tensors, for several examples in one row.

    For training on rows of `training.Packed`. Both forms share their parameters. The model is
    captured again (see `capture.packed`), the passes that made `program` are run again, and the
    result is tested: no example may affect another.

    Args:
        program: At any stage before lowering, made from a transformers decoder-only model by
            `capture_model`, with `input_ids` and `attention_mask` as keyword inputs.
        model: That model, or a folder with its `config.json`. No weight of it is read.
        max_length: Length of the longest row, in tokens.

    Raises:
        PreconditionError: `program` was made from another model.
        UnsupportedError: the model cannot keep the examples of a row apart, or fails the test.
        CaptureError: `torch.export` refused the model.
    """
    from qalora_compile.capture.encoder_decoder import disable_cache
    from qalora_compile.capture.packed import capture_packed
    from qalora_compile.capture.skeleton import as_skeleton
    from qalora_compile.training.forward.check_packed import check_packed

    skeleton = as_skeleton(model)
    disable_cache(skeleton)
    packed = replay(program, capture_packed(skeleton, max_length=max_length))
    check_packed(program, packed)
    return packed


def split_encoder_decoder(
    program: Program, model: nn.Module | str | Path, *, merged: bool = False, state: bool = False
) -> tuple[Program, Program]:
    """The same trained encoder-decoder model as the two graphs that a device runs.

    The encoder runs once per input, and also computes the keys and values of cross-attention. The
    decoder takes these and a cache of its own, and runs token by token. For inputs and outputs see
    `capture.encoder_decoder`. With `merged`, the decoder computes those keys and values in its
    first step, as transformers.js and optimum expect (`capture.merged_decoder`). As in
    `add_kv_cache`, the passes that made `program` are run again on each graph, and the tensors of
    `program` are put in.

    Args:
        program: At any stage before lowering, made by `capture_model` from an encoder-decoder model
            of transformers that takes tokens (T5, BART) or log-mel features (Whisper).
        model: That model, or a folder with its `config.json`. No weight of it is read.
        merged: Leave the keys and values of cross-attention to the decoder.
        state: The same, for a runtime that holds them as state: they are no inputs of the decoder.

    Returns:
        Encoder and decoder. A weight that both read, such as an embedding, is one tensor object.

    Raises:
        PreconditionError: `program` was made from another model.
        UnsupportedError: the model is not from transformers, or has no encoder and decoder with a
            key-value cache.
        CaptureError: `torch.export` refused the model.
    """
    from qalora_compile.capture.encoder_decoder import capture_decoder, capture_encoder
    from qalora_compile.capture.merged_decoder import (
        capture_merged_decoder,
        capture_plain_encoder,
        capture_states_decoder,
    )
    from qalora_compile.capture.skeleton import as_skeleton

    skeleton = as_skeleton(model)
    halves = (capture_encoder, capture_decoder)
    if merged or state:
        decoder_of = capture_states_decoder if state else capture_merged_decoder
        halves = (capture_plain_encoder, decoder_of)
    encoder, decoder = (replay_part(program, capture(skeleton)) for capture in halves)
    paths = {row.path for part in (encoder, decoder) for row in part.plan.to_quantize()}
    lost = [row.name for row in program.plan.to_quantize() if row.path not in paths]
    if lost:
        raise PreconditionError(
            f"neither encoder nor decoder reads {len(lost)} quantized layers of the program",
            where=", ".join(lost[:3]),
            hint="give the model that the program was made from",
        )
    return encoder, decoder

"""`capture_text_model`: one forward pass of an encoder, or of a decoder without a cache."""

from __future__ import annotations

import torch
from torch import nn

from qalora_compile.capture.causal_lm import BATCH, SEQUENCE, ones
from qalora_compile.capture.encoder_decoder import TOKENS, disable_cache
from qalora_compile.capture.export import export_model_graph
from qalora_compile.capture.model import make_program, to_evaluation_module
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.program import Program

_MASK = "attention_mask"
_EXAMPLE_SHAPE = (2, 16)


def capture_text_model(model: nn.Module) -> Program:
    """Capture an encoder, with its head if it has one, or a decoder without its cache.

    Inputs are `input_ids` and `attention_mask`, int64 `[batch, sequence]`; outputs those of the
    model, such as `last_hidden_state` `[batch, sequence, width]` or `logits`. The model's weights
    may be fake tensors, since no value is read.

    Args:
        model: A transformers model.

    Raises:
        UnsupportedError: it takes inputs other than tokens.
        CaptureError: `torch.export` refused the model.
    """
    if getattr(model, "main_input_name", None) != TOKENS:
        raise UnsupportedError(
            f"{type(model).__name__} takes inputs other than tokens",
            hint="capture it in code: qc.capture_model(model, (), inputs)",
        )
    disable_cache(model)
    axes = {name: {0: BATCH, 1: SEQUENCE} for name in (TOKENS, _MASK)}
    kwargs = {name: ones(_EXAMPLE_SHAPE) for name in axes}
    notes: list[str] = []
    with torch.no_grad():
        exported = export_model_graph(model, (), kwargs, None, notes)
    return make_program(model, to_evaluation_module(exported), (), kwargs, notes, axes=axes)

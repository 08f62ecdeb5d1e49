"""`capture_text_model`: one forward of texts, as encoders have it, or decoders without a cache."""

from __future__ import annotations

import torch
from torch import nn

from qalora_compile.capture.causal_lm import BATCH, SEQUENCE, ones
from qalora_compile.capture.encoder_decoder import disable_cache
from qalora_compile.capture.export import export_model_graph
from qalora_compile.capture.model import make_program, to_module
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.module import copy_graph, erase_unread, program_tensors
from qalora_compile.ir.program import Program

TOKENS, MASK = "input_ids", "attention_mask"
_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)
_EXAMPLE_SHAPE = (2, 16)


def capture_text_model(model: nn.Module) -> Program:
    """Capture an encoder, with its head if it has one, or a decoder that is set to give no cache.

    Inputs are `input_ids` and `attention_mask`, int64 `[batch, sequence]`; outputs those of the
    model, such as `last_hidden_state` `[batch, sequence, width]` or `logits`. The model's weights
    may be fake tensors: no value is read.

    Args:
        model: Of transformers.

    Raises:
        UnsupportedError: it takes something else than tokens.
        CaptureError: `torch.export` refused the model.
    """
    if getattr(model, "main_input_name", None) != TOKENS:
        raise UnsupportedError(
            f"{type(model).__name__} takes something else than tokens",
            hint="capture it in code: qc.capture_model(model, (), inputs)",
        )
    disable_cache(model)
    axes = {name: {0: BATCH, 1: SEQUENCE} for name in (TOKENS, MASK)}
    kwargs = {name: ones(_EXAMPLE_SHAPE) for name in axes}
    notes: list[str] = []
    with torch.no_grad():
        exported = export_model_graph(model, (), kwargs, None, notes)
    module = to_module(exported, training=False)
    graph = copy_graph(module.graph)
    # fx keeps what draws random numbers; dropout in evaluation has no effect to be kept for
    erase_unread(n for n in graph.nodes if n.target in _DROPOUTS)
    module = module.rebuild(graph, program_tensors(module))
    return make_program(model, module, (), kwargs, notes, axes=axes)

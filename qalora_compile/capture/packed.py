"""`capture_packed`: captures a language model for rows that pack several examples.

Such a row needs a mask for each pair of positions, and positions that restart in each example. The
graph of `capture_model` takes one mask value for each position and computes positions itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from qalora_compile.capture.causal_lm import BATCH, SEQUENCE, ones
from qalora_compile.capture.export import export_model_graph
from qalora_compile.capture.model import make_program, to_module
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.program import Program

_SIZES = 2, 6
_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings of models with more than a causal mask, which a given mask would replace."""


def capture_packed(model: nn.Module, *, max_length: int) -> Program:
    """Capture a transformers decoder-only model to a program at stage `float`, for packed rows.

    ==================  ==================================================================
    `input_ids`         int64 `[batch, sequence]`
    `attention_mask`    bool `[batch, 1, sequence, sequence]`: what each position sees
    `position_ids`      int64 `[batch, sequence]`
    `logits`            `[batch, sequence, vocabulary]`
    ==================  ==================================================================

    Tensors have the same names as with `capture_model`. The model's weights may be fake tensors,
    since no value is read. The caller must test whether the graph separates examples.

    Args:
        model: A transformers model without its cache; it is captured in training mode, and its mode
            is restored.
        max_length: The longest row.

    Raises:
        UnsupportedError: the model takes no position ids, or its attention window is shorter than a
            row.
        CaptureError: `torch.export` refused the model.
    """
    kind, config = type(model), getattr(model, "config", None)
    takes = inspect.signature(kind.forward).parameters
    if not {"input_ids", "attention_mask", "position_ids"} <= takes.keys():
        raise UnsupportedError(
            f"{kind.__name__} takes no position_ids, so positions cannot restart in each example",
            hint="batch the data by length instead",
        )
    for name in _WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and window < max_length:
            raise UnsupportedError(
                f"{kind.__name__} masks positions more than {window} apart ({name}), which a mask "
                "for packed rows would replace",
                hint=f"use rows of at most {window} tokens, or batch the data by length",
            )
    mask = torch.ones(_SIZES[0], 1, _SIZES[1], _SIZES[1], dtype=torch.bool).tril()
    kwargs: dict[str, Any] = {
        "input_ids": ones(_SIZES),
        "attention_mask": mask,
        "position_ids": torch.arange(_SIZES[1]).repeat(_SIZES[0], 1),
    }
    both = {0: BATCH, 1: SEQUENCE}
    axes = {**dict.fromkeys(kwargs, both), "attention_mask": {0: BATCH, 2: SEQUENCE, 3: SEQUENCE}}
    shapes = {name: dict.fromkeys(axes[name], Dim.DYNAMIC) for name in kwargs}
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # a graph captured in evaluation mode lacks attention dropout
    try:
        exported = export_model_graph(model, (), kwargs, shapes, [])
    finally:
        for module, training in modes:
            module.training = training
    module = to_module(exported, training=True).train(False)
    return make_program(model, module, (), kwargs, axes=axes)

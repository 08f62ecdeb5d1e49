"""`capture_packed`: a language model that reads several examples in one row.

Such a row needs a mask for each pair of positions, and positions that begin anew in each example;
the graph that `capture_model` makes of a model takes one mask for each position, and counts by
itself.
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
"""Settings of a model that masks more than what comes later; a given mask replaces all of it."""


def capture_packed(model: nn.Module, *, max_length: int) -> Program:
    """Capture a transformers decoder-only model to a program at stage `float`, for packed rows.

    ==================  ==================================================================
    `input_ids`         int64 `[batch, sequence]`
    `attention_mask`    bool `[batch, 1, sequence, sequence]`: what each position sees
    `position_ids`      int64 `[batch, sequence]`
    `logits`            `[batch, sequence, vocabulary]`
    ==================  ==================================================================

    Tensors keep the names that `capture_model` gives them. The model's weights may be fake tensors:
    no value is read. Whether the graph keeps examples apart is for the caller to try out.

    Args:
        model: From transformers, with its cache switched off; it is captured in training mode, and
            comes back in its own.
        max_length: The longest row.

    Raises:
        UnsupportedError: the model takes no position ids, or masks by a window shorter than a row.
        CaptureError: `torch.export` refused the model.
    """
    kind, config = type(model), getattr(model, "config", None)
    takes = inspect.signature(kind.forward).parameters
    if not {"input_ids", "attention_mask", "position_ids"} <= takes.keys():
        raise UnsupportedError(
            f"{kind.__name__} takes no position_ids, so examples in one row would count on",
            hint="arrange the data by length instead",
        )
    for name in _WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and window < max_length:
            raise UnsupportedError(
                f"{kind.__name__} masks what is further away than {window} ({name}), which a mask "
                "for packed rows would replace",
                hint=f"use rows of at most {window} tokens, or arrange the data by length",
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
    model.train()  # attention dropout leaves no trace in a graph captured in evaluation
    try:
        exported = export_model_graph(model, (), kwargs, shapes, [])
    finally:
        for module, training in modes:
            module.training = training
    module = to_module(exported, training=True).train(False)
    return make_program(model, module, (), kwargs, axes=axes)

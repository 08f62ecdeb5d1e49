"""Traceable rotary embeddings whose frequencies depend on the length of the text.

For dynamic NTK scaling, transformers branches on the length in Python and keeps the frequencies
between calls; for LongRoPE it writes them into the model, where tracing would leave tensors without
values. For a single text, the frequencies are a function of its last position, and that function is
captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.transformers_internals import (
    first_frequencies,
    rope_frequencies,
    rope_types,
    with_frequencies,
)

_DYNAMIC, _LONG = "dynamic", "longrope"


@contextmanager
def traceable_rope(model: nn.Module) -> Iterator[None]:
    """Make the length-dependent rotary embeddings of transformers traceable in the block."""
    changed = [module for module in model.modules() if _follows_length(module)]
    for module in changed:
        module.forward = _forward(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _follows_length(module: nn.Module) -> bool:
    return not {_DYNAMIC, _LONG}.isdisjoint(rope_types(module).values())


def _forward(module: Any) -> Any:
    """`forward` of a rotary embedding, with frequencies from the last position of its input."""
    plain, kinds = inspect.unwrap(type(module).forward), rope_types(module)

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        stand_in = module
        if kinds[layer_type] in (_DYNAMIC, _LONG):
            with torch.no_grad():
                found = _frequencies(module, kinds[layer_type], position_ids, layer_type)
            stand_in = with_frequencies(module, layer_type, found)
        return plain(stand_in, x, position_ids, **_of_layer(layer_type))

    return forward


def _of_layer(layer_type: str | None) -> dict[str, str]:
    return {} if layer_type is None else {"layer_type": layer_type}


def _frequencies(module: Any, kind: str, position_ids: Tensor, layer_type: str | None) -> Tensor:
    """The frequencies for a text whose last position is the last of these."""
    length, options = torch.max(position_ids) + 1, _of_layer(layer_type)
    config, device = module.config, position_ids.device
    if kind == _DYNAMIC:
        return rope_frequencies(config, kind, device, seq_len=length, **options)
    settings = config.rope_parameters
    if layer_type is not None:
        settings = settings[layer_type]
    trained = settings["original_max_position_embeddings"]
    long = rope_frequencies(config, kind, device, seq_len=trained + 1, **options)
    return torch.where(length > trained, long, first_frequencies(module, layer_type))

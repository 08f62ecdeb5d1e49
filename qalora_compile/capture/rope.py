"""Rotary embeddings whose frequencies follow the length of the text, in a form that can be traced.

For dynamic NTK scaling, transformers compares a length with a number in Python and keeps the
frequencies from one call to the next; for LongRoPE it writes them into the model, where tracing
would leave tensors without values. What is computed for a text by itself is a function of the
text's last position, and this is what is captured.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_DYNAMIC, _LONG = "dynamic", "longrope"


@contextmanager
def traceable_rope(model: nn.Module) -> Iterator[None]:
    """Let every rotary embedding of transformers that follows the length be traced."""
    changed = [module for module in model.modules() if _follows_length(module)]
    for module in changed:
        module.forward = _forward(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _follows_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    found = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    known = type(module).__module__.startswith("transformers.")
    return known and not found.isdisjoint((_DYNAMIC, _LONG))


def _forward(module: Any) -> Any:
    """`forward` of a rotary embedding, with frequencies from the last position of its input."""
    plain = inspect.unwrap(type(module).forward)

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        options = {} if layer_type is None else {"layer_type": layer_type}
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        stand_in = copy.copy(module)
        if kind in (_DYNAMIC, _LONG):
            prefix = "" if layer_type is None else f"{layer_type}_"
            with torch.no_grad():
                found = _frequencies(module, kind, position_ids, prefix, options)
            stand_in._buffers = {**module._buffers, f"{prefix}inv_freq": found}
        return plain(stand_in, x, position_ids, **options)

    return forward


def _frequencies(
    module: Any, kind: str, position_ids: Tensor, prefix: str, options: dict[str, str]
) -> Tensor:
    """The frequencies for a text that ends at the last of these positions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length, compute = torch.max(position_ids) + 1, ROPE_INIT_FUNCTIONS[kind]
    if kind == _DYNAMIC:
        scaled: Tensor = compute(module.config, position_ids.device, seq_len=length, **options)[0]
        return scaled
    settings = module.config.rope_parameters
    for layer_type in options.values():
        settings = settings[layer_type]
    trained = settings["original_max_position_embeddings"]
    long, _ = compute(module.config, position_ids.device, seq_len=trained + 1, **options)
    return torch.where(length > trained, long, getattr(module, f"{prefix}original_inv_freq"))

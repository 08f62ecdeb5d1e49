"""Calls of language models as devices make them: a prompt, then a few tokens, then single ones.

Kernels have separate code paths for one token and for many, and a mistake may show only at one
token, at two, after many positions, in the second sequence, or next to padding. `decoding_calls`
are for a program with a key-value cache; `sequence_calls` are complete sequences, which
`verify.runners.kv_cache` splits into such steps for an exported model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.verify.inputs import draw_leaves, is_mask, rebuild_call, token_limits
from qalora_compile.verify.numeric.run_float64 import run_nodes

_SHAPES = {
    "prompt": (2, 0, 12),
    "one token": (1, 23, 1),
    "one token, padded": (2, 9, 1),
    "two tokens, padded": (2, 14, 2),
    "one token, far": (2, 71, 1),
}
"""Rows, past tokens (fewer if a table of positions is shorter), new tokens.

The first of two rows is padded on the left.
"""
_PADDED = 3
_LENGTHS = (80, 48, 24)
"""Tokens of a long sequence; the first length that the program accepts is taken."""
_MOST_WORDS, _ROW = 2048, 32


def decoding_calls(program: Program, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Calls of a decoder with its cache, by name; none for other programs.

    Past keys and values are random; positions count from the first token that is not padding.
    """
    signature = program.signature
    if not signature.cache or signature.cross_cache:
        return {}
    calls = {}
    for index, (name, (batch, past, new)) in enumerate(_SHAPES.items()):
        for before in dict.fromkeys((past, past * 2 // 3, past // 3)):
            generator = torch.Generator().manual_seed(seed + 100 + index)
            sizes = {"batch": batch, "past_sequence": before, "sequence": new}
            leaves = draw_leaves(program, sizes | {"total_sequence": before + new}, generator)
            call = _padded(program, leaves, new)
            if _runs(program, call):
                calls[name] = rebuild_call(program, call)
                break
    return calls


def sequence_calls(program: Program, *, seed: int = 0) -> list[dict[str, Any]]:
    """Two calls for a model that reads tokens: one long sequence, and two rows with padding.

    None if the program has inputs other than tokens and a mask.
    """
    leaves = program.signature.inputs
    tokens = [leaf for leaf in leaves if leaf.name in token_limits(program)]
    others = [leaf for leaf in leaves if leaf not in tokens and leaf.dtype is not None]
    if len(tokens) != 1 or len(tokens[0].shape) != 2 or not all(map(is_mask, others)):
        return []
    for length in _LENGTHS:
        calls = []
        for batch in (1, 2):
            generator = torch.Generator().manual_seed(seed + 200 + batch)
            sizes = {"batch": batch, "sequence": length, "total_sequence": length}
            calls.append(_padded(program, draw_leaves(program, sizes, generator), length))
        if all(_runs(program, call) for call in calls):
            return [rebuild_call(program, call) for call in calls]
    return []


def every_token(program: Program, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """A call in which each token id occurs; none if there are more than 2,048 of them."""
    limits = token_limits(program)
    words = max(limits.values(), default=0)
    if not 0 < words <= _MOST_WORDS:
        return {}
    generator = torch.Generator().manual_seed(seed)
    for length in (_ROW, _ROW // 4):
        rows = -(-words // length)
        sizes = {"batch": rows, "sequence": length, "past_sequence": 7}
        leaves = draw_leaves(program, sizes | {"total_sequence": 7 + length}, generator)
        each = torch.randperm(rows * length, generator=generator)
        call = [
            _cover_tokens(each, limits[leaf.name], value) if leaf.name in limits else value
            for leaf, value in zip(program.signature.inputs, leaves, strict=True)
        ]
        complete = all(
            set(range(limits[leaf.name])) <= set(value.flatten().tolist())
            for leaf, value in zip(program.signature.inputs, call, strict=True)
            if leaf.name in limits
        )
        if complete and _runs(program, call):
            return {"every token": rebuild_call(program, call)}
    return {}


def _cover_tokens(each: Tensor, words: int, like: Tensor) -> Tensor:
    """Ids in the shape of an input, all of them if there is room."""
    ids = each[: like.numel()] if like.numel() <= len(each) else each.repeat(like.numel())
    return (ids[: like.numel()] % words).reshape(like.shape).to(like.dtype)


def _padded(program: Program, leaves: list[Any], new: int) -> list[Any]:
    """A mask that pads the first of two rows on the left, and the positions after the padding."""
    inputs = program.signature.inputs
    changed = list(leaves)
    counted: Tensor | None = None
    for index, (leaf, value) in enumerate(zip(inputs, leaves, strict=True)):
        if is_mask(leaf) and value.dim() == 2:
            mask = torch.ones_like(value)
            mask[: len(mask) - 1, :_PADDED] = 0
            changed[index], counted = mask, mask
    for index, (leaf, value) in enumerate(zip(inputs, leaves, strict=True)):
        if "position" in leaf.name and counted is not None:
            places = (counted.long().cumsum(1) - 1).clamp(min=0)
            changed[index] = places[:, -new:].to(value.dtype)
    return changed


def _runs(program: Program, leaves: list[Any]) -> bool:
    """Whether the program accepts a call: its axes and tables of positions have limits."""
    try:
        program.signature.check(leaves)
        run_nodes(program, leaves, ())
    except UserInputError:
        return False
    return True

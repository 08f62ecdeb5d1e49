"""Inputs that look for trouble: zeros, one-hot, large and denormal values, extreme tokens, padding.

Each is a random call in which every input of one kind takes the odd form, and the others do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import InputLeaf, argument_names, flatten_inputs
from qalora_compile.verify.inputs import is_mask, rebuild_call, sample_inputs, token_limits

_LARGE = {torch.float16: 2.0**6, torch.float32: 2.0**12, torch.bfloat16: 2.0**12}
_TINY = {torch.float16: 2.0**-18, torch.float32: 2.0**-130, torch.bfloat16: 2.0**-130}
"""Factors of standard normal values; the second below the least normal number of the dtype."""

Odd = Callable[[Tensor], Tensor]


def adversarial_inputs(program: Program, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Calls by what is odd about them, as keyword arguments; see `sample_inputs` for the rest.

    ======================= ======================================================================
    `zeros`, `one-hot`      floating inputs are 0, or 1 in one column of each row and 0 elsewhere
    `large`, `denormal`     … are standard normal times 2¹² (2⁶ in float16), or below the least
                            normal number
    `first token`,          token ids are all 0, or all the last row of their table
    `last token`
    `all padding`           masks (inputs named `…mask…`) are 0
    `left padding`,         … are 0 in the first, or the last, half of the sequence
    `right padding`
    ======================= ======================================================================

    What a program has no input for is left out.

    Args:
        program: Whose signature is followed.
        seed: Of the random part.
    """
    limits = token_limits(program)
    leaves = program.signature.inputs
    kinds: dict[str, tuple[Callable[[InputLeaf, Tensor], bool], Callable[[InputLeaf], Odd]]] = {
        "zeros": (_is_float, lambda _: torch.zeros_like),
        "one-hot": (_is_float, lambda _: _one_hot),
        "large": (_is_float, lambda _: lambda t: t * _LARGE.get(t.dtype, 2.0**12)),
        "denormal": (_is_float, lambda _: lambda t: t * _TINY.get(t.dtype, 2.0**-1030)),
        "first token": (lambda leaf, _: leaf.name in limits, lambda _: torch.zeros_like),
        "last token": (
            lambda leaf, _: leaf.name in limits,
            lambda leaf: lambda t: torch.full_like(t, limits[leaf.name] - 1),
        ),
        "all padding": (_is_mask_leaf, lambda _: torch.zeros_like),
        "left padding": (_is_mask_leaf, lambda _: lambda t: _half(t, first=True)),
        "right padding": (_is_mask_leaf, lambda _: lambda t: _half(t, first=False)),
    }
    calls = {}
    for index, (name, (applies, make)) in enumerate(kinds.items()):
        # The second of two random calls: its batch is larger than 1.
        drawn = sample_inputs(program, 2, seed=seed + 1 + index)[1]
        flat = flatten_inputs(program.graph, [drawn[n] for n in argument_names(program.graph)])
        chosen = [
            isinstance(value, Tensor) and value.numel() > 0 and applies(leaf, value)
            for leaf, value in zip(leaves, flat, strict=True)
        ]
        if any(chosen):
            odd = [
                make(leaf)(value) if taken else value
                for leaf, value, taken in zip(leaves, flat, chosen, strict=True)
            ]
            calls[name] = rebuild_call(program, odd)
    return calls


def _is_float(leaf: InputLeaf, value: Tensor) -> bool:
    return value.is_floating_point() and not is_mask(leaf)


def _is_mask_leaf(leaf: InputLeaf, value: Tensor) -> bool:
    return is_mask(leaf)


def _one_hot(value: Tensor) -> Tensor:
    """1 in one column of each row, another one from row to row."""
    rows = torch.zeros_like(value).reshape(-1, value.shape[-1])
    index = torch.arange(len(rows))
    rows[index, (index * 7) % rows.shape[1]] = 1
    return rows.reshape(value.shape)


def _half(mask: Tensor, *, first: bool) -> Tensor:
    """0 in one half of the last axis."""
    odd, middle = mask.clone(), mask.shape[-1] // 2
    odd[..., :middle] = 0 if first else odd[..., :middle]
    odd[..., middle:] = odd[..., middle:] if first else 0
    return odd

"""Edge-case inputs: zeros, one-hot, large and denormal values, extreme tokens, padding.

Each is a random call in which every input of one kind takes the unusual form and the others do not.
One more is a long call, which exercises what depends on the distance between positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import InputLeaf, SizeRange, argument_names, flatten_inputs
from qalora_compile.verify.inputs import is_mask, rebuild_call, sample_inputs, token_limits
from qalora_compile.verify.numeric.run_float64 import run_nodes

_LARGE = {torch.float16: 2.0**6, torch.float32: 2.0**12, torch.bfloat16: 2.0**12}
_TINY = {torch.float16: 2.0**-18, torch.float32: 2.0**-130, torch.bfloat16: 2.0**-130}
"""Factors of standard normal values. The second is below the dtype's least normal number."""
_LONG, _BEYOND, _WIDEST = 160, 32, 512
_COMPARING = ("lt", "le", "gt", "ge", "add", "sub", "tril", "triu")
"""Operators whose integer operands may be distances between positions."""

Odd = Callable[[Tensor], Tensor]


def adversarial_inputs(program: Program, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Edge-case calls by name, as keyword arguments; other values are as in `sample_inputs`.

    ======================= ======================================================================
    `zeros`, `one-hot`      floating inputs are 0, or 1 in one column of each row and 0 elsewhere
    `large`, `denormal`     … are standard normal times 2¹² (2⁶ in float16), or below the least
                            normal number
    `first token`,          token ids are all 0, or all the last row of their table
    `last token`
    `all padding`           masks (inputs named `…mask…`) are 0
    `left padding`,         … are 0 in the first, or the last, half of the sequence
    `right padding`
    `long`                  one row of 160 positions, or 32 more than the largest integer up to
                            512 that positions are compared with: a sliding window shows there. As
                            many as the program takes, where it takes fewer
    ======================= ======================================================================

    Calls for which the program has no input are left out.

    Args:
        program: Its signature determines the inputs.
        seed: Seed of the random values.
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
    return calls | _long_call(program, seed)


def _long_call(program: Program, seed: int) -> dict[str, dict[str, Any]]:
    """A call of the wanted length, or of the largest that the program accepts; {} if none."""
    drawn = sample_inputs(program, 1, seed=seed)[0]
    flat = flatten_inputs(program.graph, [drawn[n] for n in argument_names(program.graph)])
    pairs = list(zip(program.signature.inputs, flat, strict=True))
    sizes = {
        name: size
        for leaf, value in pairs
        if isinstance(value, Tensor)
        for name, size in zip(leaf.shape, value.shape, strict=True)
        if isinstance(name, str)
    }
    growing = [name for name in sizes if name.endswith("sequence") and not name.startswith("past")]
    if not growing:
        return {}

    def make(length: int) -> list[Any] | None:
        longer = _longer(sizes, growing, length, program.signature.ranges)
        leaves = [_lengthened(leaf, value, longer, seed) for leaf, value in pairs]
        return leaves if _runs(program, leaves) else None

    low, high = max(sizes[name] for name in growing), _wanted_length(program)
    best = make(high)
    if best is None:
        # A table of positions has a length that no signature states.
        while high - low > 1:
            middle = (low + high) // 2
            found = make(middle)
            low, high, best = (low, middle, best) if found is None else (middle, high, found)
    return {} if best is None else {"long": rebuild_call(program, best)}


def _longer(
    sizes: Mapping[str, int], growing: Sequence[str], length: int, ranges: Sequence[SizeRange]
) -> dict[str, int]:
    """The sizes of all axes, the sequence axes at `length` or at the end of their range."""
    limits = {limit.name: limit for limit in ranges}
    longer = dict(sizes)
    for name in growing:
        longer[name] = limits[name].nearest(length) if name in limits else length
    if {"sequence", "total_sequence"} <= set(sizes):
        longer["total_sequence"] = longer["sequence"] + sizes.get("past_sequence", 0)
    return longer


def _wanted_length(program: Program) -> int:
    """How many positions exceed every window that the graph compares with."""
    numbers = [
        value
        for node in program.graph.nodes
        if str(node.target).partition(".")[2].partition(".")[0] in _COMPARING
        for value in node.args
        if type(value) is int and value <= _WIDEST
    ]
    return max(_LONG, max(numbers, default=0) + _BEYOND)


def _lengthened(leaf: InputLeaf, value: Any, sizes: Mapping[str, int], seed: int) -> Any:
    """Values for longer axes: ones in masks, consecutive positions, rows drawn at random."""
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator().manual_seed(seed)
    for axis, name in enumerate(leaf.shape):
        size = sizes.get(name, 0) if isinstance(name, str) else 0
        if size > value.shape[axis] > 0:
            picks = torch.randint(0, value.shape[axis], (size,), generator=generator)
            value = value.index_select(axis, picks)
            if "position" in leaf.name and not value.is_floating_point():
                begin = sizes.get("past_sequence", 0)
                shape = [size if at == axis else 1 for at in range(value.dim())]
                places = torch.arange(begin, begin + size, dtype=value.dtype)
                value = places.reshape(shape).expand(value.shape).clone()
    return value


def _runs(program: Program, leaves: Sequence[Any]) -> bool:
    """Whether the program accepts a call of this length."""
    try:
        program.signature.check(leaves)
        run_nodes(program, leaves, ())
    except (UserInputError, IndexError, RuntimeError):
        return False
    return True


def _is_float(leaf: InputLeaf, value: Tensor) -> bool:
    return value.is_floating_point() and not is_mask(leaf)


def _is_mask_leaf(leaf: InputLeaf, value: Tensor) -> bool:
    return is_mask(leaf)


def _one_hot(value: Tensor) -> Tensor:
    """1 in one column of each row, a different column from row to row."""
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

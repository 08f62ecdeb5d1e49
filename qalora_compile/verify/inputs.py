"""Random inputs drawn from a signature, for verification without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import (
    InputLeaf,
    SizeRange,
    argument_names,
    flatten_inputs,
    input_spec,
)
from qalora_compile.ir.spec import GROUP_EMBEDDING
from qalora_compile.ir.torch_internals import pytree

_SIZES = {"batch": 3, "sequence": 24, "past_sequence": 7}
_OTHER_SIZE = 5
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
_LOOKUPS = {
    torch.ops.aten.embedding.default: ("indices", "weight"),
    GROUP_EMBEDDING: ("ids", "qweight"),
}
"""Lookup operators, with the names of their index and table operands."""
"""The positions of a lookup's ids and of its table."""


def sample_inputs(program: Program, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`count` calls, as keyword arguments, whose sizes vary where the signature allows it.

    Token ids stay below the number of rows of the embedding that reads them; inputs named `…mask…`
    are ones; other integers and booleans repeat values of the example; floats are standard normal.
    """
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for index in range(count):
        # The first call has batch 1; later ones vary batch and length, equally for all inputs.
        sizes = _SIZES | {"sequence": _SIZES["sequence"] + index}
        sizes["total_sequence"] = sizes["past_sequence"] + sizes["sequence"]
        if index == 0:
            sizes["batch"] = 1
        calls.append(rebuild_call(program, draw_leaves(program, sizes, generator)))
    return calls


def draw_leaves(
    program: Program, sizes: Mapping[str, int], generator: torch.Generator
) -> list[Any]:
    """Random flat inputs; see `sample_inputs`.

    Args:
        program: Its signature determines the inputs.
        sizes: Axis sizes by name. Others are 5. Each stays within the axis's range.
        generator: Source of the random values.
    """
    args, kwargs = program.example
    example = flatten_inputs(program.graph, [*args, *kwargs.values()])
    limits, ranges = token_limits(program), program.signature.ranges
    return [
        _sample(leaf, value, limits.get(leaf.name), sizes, generator, ranges)
        for leaf, value in zip(program.signature.inputs, example, strict=True)
    ]


def padded_inputs(program: Program, *, seed: int = 0) -> list[dict[str, Any]]:
    """Calls whose masks exclude the last or the first positions; none if there is no mask.

    Rows lose different numbers of positions, and no row loses all of them.
    """
    drawn = sample_inputs(program, 2, seed=seed)[1]
    leaves = program.leaves((), drawn)
    chosen = [
        is_mask(leaf) and isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] > 1
        for leaf, value in zip(program.signature.inputs, leaves, strict=True)
    ]
    if not any(chosen):
        return []
    return [
        rebuild_call(
            program,
            [
                _padded(value, first=first) if taken else value
                for value, taken in zip(leaves, chosen, strict=True)
            ],
        )
        for first in (False, True)
    ]


def _padded(mask: Tensor, *, first: bool) -> Tensor:
    """A mask with zeros at one end of the last axis, on more positions from row to row."""
    odd, length = mask.clone(), mask.shape[-1]
    for row, values in enumerate(odd):
        count = min(length - 1, length // 3 + row)
        values[..., slice(0, count) if first else slice(length - count, length)] = 0
    return odd


def rebuild_call(program: Program, leaves: Sequence[Any]) -> dict[str, Any]:
    """The call, as keyword arguments, that has these flat inputs."""
    args, kwargs = pytree.tree_unflatten(list(leaves), input_spec(program.graph))
    names = argument_names(program.graph)
    return dict(zip(names, [*args, *kwargs.values()], strict=True))


def is_mask(leaf: InputLeaf) -> bool:
    """Whether an input is a mask, which its name tells."""
    return "mask" in leaf.name


def token_limits(program: Program) -> dict[str, int]:
    """Number of rows of the embedding that reads each input, directly or through a reshape."""
    limits = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for leaf, node in zip(program.signature.inputs, placeholders, strict=True):
        sources = [node, *(user for user in node.users if user.target in _RESHAPES)]
        for user in (user for source in sources for user in source.users):
            ids, rows = _LOOKUPS.get(user.target, ("", ""))
            if ids and argument(user, ids) in sources:
                table = get_tensor(program.module, str(argument(user, rows).target))
                if table is not None:
                    limits[leaf.name] = int(table.shape[0])
    return limits


def _sample(
    leaf: InputLeaf,
    example: Any,
    rows: int | None,
    sizes: Mapping[str, int],
    generator: torch.Generator,
    ranges: Sequence[SizeRange],
) -> Any:
    if not isinstance(example, Tensor):
        return example
    shape = []
    for dim in leaf.shape:
        size = dim if isinstance(dim, int) else sizes.get(dim, _OTHER_SIZE)
        limit = next((r for r in ranges if r.name == dim), None)
        shape.append(size if limit is None else limit.nearest(size))
    if is_mask(leaf):
        return torch.ones(shape, dtype=example.dtype)
    if example.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(example.dtype)
    if rows is not None:
        return torch.randint(0, rows, shape, generator=generator, dtype=example.dtype)
    picks = torch.randint(0, max(example.numel(), 1), shape, generator=generator)
    return example.flatten()[picks]

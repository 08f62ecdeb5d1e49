"""What exporters share that trace a legalized program again."""

from __future__ import annotations

import dataclasses

from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.ir.affine import group_count
from qalora_compile.ir.lazy_tensor import is_lazy, materialize
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.program import Program


def with_values(program: Program) -> Program:
    """The program with every tensor in memory."""
    tensors = program.tensors()
    if not any(map(is_lazy, tensors.values())):
        return program
    made = {name: materialize(tensor) for name, tensor in tensors.items()}
    module = program.module.rebuild(program.copy_graph(), made)
    return dataclasses.replace(program, module=module)


def pooled_adapter(pooled: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """`qalora.pooled_adapter` in float32, of ATen's operators."""
    return functional.linear(functional.linear(pooled, lora_a), lora_b) * scaling


def pad_groups(x: Tensor, group_size: int, width: int) -> Tensor:
    """`qalora.pad_groups`, of ATen's operators: `[.., K]` to `[.., L · width]`."""
    groups = group_count(x.shape[-1], group_size)
    padded = functional.pad(x, (0, groups * group_size - x.shape[-1]))
    if width == group_size:
        return padded
    grouped = padded.unflatten(-1, (groups, group_size))
    return functional.pad(grouped, (0, width - group_size)).flatten(-2)


def down_to_site(before: fx.Node, after: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Follow two calls through their only readers to the sums that are marked with a site."""
    while site_of(before) is None and len(before.users) == len(after.users) == 1:
        (before,), (after,) = before.users, after.users
    return before, after

"""The operator of target `torch`, registered as `torch.ops.qalora.int4pack_linear`.

It has no gradient: lowered programs do not train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.ops.linear import NAMESPACE
from qalora_compile.ir.ops.views import OperatorView, view_of
from qalora_compile.ir.torch_internals import INT4_PRODUCT


def int4pack_rows(
    x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int, n: int
) -> Tensor:
    """`int4pack_linear` as operators of ATen."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = INT4_PRODUCT(rows, packed, group_size, scale_and_zero)
    if n != packed.shape[0]:
        y = y[:, :n]
    return y.reshape(*x.shape[:-1], n)


@torch.library.custom_op(f"{NAMESPACE}::int4pack_linear", mutates_args=())
def int4pack_linear(
    x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int, n: int
) -> Tensor:
    """Y = x Wᵀ, `W = scale · (q − 8) + zero`, by torch's kernel for 4-bit weights.

    Args:
        x: `[.., K]` float32; the kernel does not take float64, in which the weights are expanded.
        packed: `[N', K / 2]` uint8, see `packing.int4_layout`; N' is N, rounded up to 16.
        scale_and_zero: `[K / g, N', 2]` float32.
        group_size: g: 32, 64, 128 or 256.
        n: N.
    """
    if x.dtype == torch.float64:
        return x @ _expanded(packed, scale_and_zero, group_size, x.shape[-1])[:, :n]
    return int4pack_rows(x, packed, scale_and_zero, group_size, n).clone()


def _expanded(packed: Tensor, scale_and_zero: Tensor, group_size: int, k: int) -> Tensor:
    """Wᵀ `[K, N']` in float64: the kernel's products with ones give q − 8 exactly."""
    scale, zero = scale_and_zero.double().unbind(-1)
    ones = torch.stack((torch.ones_like(scale), torch.zeros_like(zero)), dim=-1).float()
    codes = INT4_PRODUCT(torch.eye(k, dtype=torch.float32), packed, group_size, ones).double()
    step, start = (part.repeat_interleave(group_size, dim=0)[:k] for part in (scale, zero))
    weights: Tensor = step * codes + start
    return weights


@int4pack_linear.register_fake
def _int4pack_linear_fake(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-1])


@view_of(int4pack_linear)
@dataclass(frozen=True)
class Int4packLinear(OperatorView):
    """A node of `int4pack_linear`."""

    x: fx.Node
    packed: fx.Node
    scale_and_zero: fx.Node
    group_size: int
    n: int

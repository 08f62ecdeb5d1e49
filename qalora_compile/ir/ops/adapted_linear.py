"""`qalora::adapted_linear`: a quantized layer with its pooled adapter, as one operator to train.

The update of a pooled adapter is constant inside a group, so it is part of the weight's offset:

    y = x Wᵀ + b + scaling · (S(x) Aᵀ) Bᵀ = x W'ᵀ + b,  W' = scale · q + offset + scaling · (B A)

(arXiv 2309.14717, Algorithm 1). The product B A is `[N, L]`, g times smaller than W. Folding it for
the time of one call makes the adapter almost free, forward and in the gradient by x. The backward
keeps S(x), `[.., L]`, not x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.ir.affine import expand_groups, sum_groups
from qalora_compile.ir.ops.linear import (
    NAMESPACE,
    input_grad_fake,
    input_grad_on_codes,
    linear_on_codes,
)
from qalora_compile.ir.ops.views import OperatorView, view_of


def folded_offset(
    offset: Tensor, lora_a: Tensor, lora_b: Tensor, group_size: int, pool: int, scaling: float
) -> Tensor:
    """Offset + scaling · B A, `[N, L]`; pooling groups are `pool // group_size` groups wide."""
    update = (lora_b @ lora_a).mul_(scaling).to(offset.dtype)
    return offset + expand_groups(update, pool // group_size, offset.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bits: int,
    group_size: int,
    pool: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Y = x Wᵀ + b + scaling · (S(x) Aᵀ) Bᵀ, `[.., N]`, and S(x), `[.., L']`.

    Args:
        x: `[.., K]`, in the dtype of the adapter.
        qweight: `[N, ceil(K / 8) · bits]` uint8, see `packing`.
        scale: `[N, L]`, float32 or float64.
        offset: `[N, L]`, as `scale`.
        bias: `[N]` or None.
        lora_A: `[r, L']`, L' = ceil(K / pool).
        lora_B: `[N, r]`.
        bits: Width of a code.
        group_size: g.
        pool: Width of a pooling group, a multiple of g.
        scaling: alpha / rank times the pooling factor f.

    Equal to `group_linear` + `pooled_adapter` up to reassociation. S(x) is an output only to be
    saved for the backward: no gradient passes through it.
    """
    folded = folded_offset(offset, lora_A, lora_B, group_size, pool, scaling)
    y = linear_on_codes(x, qweight, scale, folded, bias, bits, group_size)
    return y, sum_groups(x, pool)


@adapted_linear.register_fake
def _adapted_linear_fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty(*lead, qweight.shape[0]), x.new_empty(*lead, lora_A.shape[1])


@view_of(adapted_linear)
@dataclass(frozen=True)
class AdaptedLinear(OperatorView):
    """A node of `adapted_linear`."""

    x: fx.Node
    qweight: fx.Node
    scale: fx.Node
    offset: fx.Node
    bias: fx.Node | None
    lora_A: fx.Node
    lora_B: fx.Node
    bits: int
    group_size: int
    pool: int
    scaling: float


@torch.library.custom_op(f"{NAMESPACE}::adapted_linear_input_grad", mutates_args=())
def adapted_linear_input_grad(
    grad: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bits: int,
    group_size: int,
    pool: int,
    scaling: float,
    k: int,
) -> Tensor:
    """Gradient of `adapted_linear` by x: `grad W'`, `[.., N]` to `[.., K]`."""
    folded = folded_offset(offset, lora_A, lora_B, group_size, pool, scaling)
    return input_grad_on_codes(grad, qweight, scale, folded, bits, group_size, k)


adapted_linear_input_grad.register_fake(input_grad_fake)


def _adapted_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, qweight, scale, offset, _, lora_a, lora_b, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qweight, scale, offset, lora_a, lora_b, output[1])
    ctx.options = (*options, x.shape[-1])


def _adapted_linear_backward(
    ctx: Any, grad: Tensor | None, grad_pooled: Tensor | None
) -> tuple[Tensor | None, ...]:
    *weight, pooled = ctx.saved_tensors
    lora_a, lora_b = weight[-2:]
    nothing = (None,) * 4
    if grad is None:
        return (None, None, None, None, None, None, None, *nothing)
    grad_x = grad_a = grad_b = grad_bias = None
    rows, sums = grad.reshape(-1, grad.shape[-1]), pooled.reshape(-1, pooled.shape[-1])
    scaling = ctx.options[3]
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qalora.adapted_linear_input_grad(grad, *weight, *ctx.options)
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0)
    if ctx.needs_input_grad[5]:
        grad_a = (rows @ lora_b).t() @ sums * scaling
    if ctx.needs_input_grad[6]:
        grad_b = rows.t() @ functional.linear(sums, lora_a) * scaling
    return (grad_x, None, None, None, grad_bias, grad_a, grad_b, *nothing)


adapted_linear.register_autograd(_adapted_linear_backward, setup_context=_adapted_linear_setup)

"""`qalora::affine_linear`: a quantized layer whose scales, and codes, train with its offsets.

    W = scale' · q' + offset'       scale'  = scale · (1 + G)
                                    offset' = offset · (1 + G) + scaling · (B A)
                                    q'      = round(q + STEP · U), within 0 … 2^bits − 1

G `[N, L]` is one factor for each group, B A the pooled update (arXiv 2309.14717, Algorithm 1), and
U `[N, K]`, which may be absent, moves codes. With G = 0 and no U this is the pooled adapter; with
B A = 0 and no U it trains all scales and leaves zero-points alone (PEQA, arXiv 2305.14152). The
backward passes gradients through the rounding of codes as if it were the identity within
0 … 2^bits − 1 (straight-through estimator, arXiv 1308.3432); `q + STEP · U` is the latent weight in
units of codes. The forward computes with the numbers that folding stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.affine import expand_groups, sum_groups
from qalora_compile.ir.ops.linear import NAMESPACE, LinearOnCodes, linear_on_codes, tile_rows
from qalora_compile.ir.ops.views import view_of
from qalora_compile.ir.packing.bitstream import pack_codes, unpack_codes

STEP = 4.0
"""Codes by which U = 1 moves a weight: a power of two, so that the product is exact."""


def affine_parameters(
    scale: Tensor,
    offset: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor,
    pool: int,
    group_size: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Scale' and offset', `[N, L]`, computed in float64, in the dtype of `scale`.

    For the arguments see `affine_linear`.
    """
    update = scaling * (lora_b.double() @ lora_a.double())
    factor = 1 + gain.double()
    moved = offset.double() * factor + expand_groups(update, pool // group_size, offset.shape[1])
    return (scale.double() * factor).to(scale.dtype), moved.to(scale.dtype)


@torch.library.custom_op(f"{NAMESPACE}::moved_codes", mutates_args=())
def moved_codes(qweight: Tensor, shift: Tensor, bits: int) -> Tensor:
    """q', packed as `qweight` is: the codes nearest to q + STEP · U (`shift`, `[N, K]`)."""
    parts = tile_rows(qweight, shift.shape[1])
    moved = (nearest_codes(latent_codes(qweight[p], shift[p], bits), bits).byte() for p in parts)
    return torch.cat([pack_codes(codes, bits) for codes in moved])


def latent_codes(qweight: Tensor, shift: Tensor, bits: int) -> Tensor:
    """Rows of q + STEP · U, in the dtype of U."""
    return unpack_codes(qweight, bits, shift.shape[1]).to(shift.dtype) + shift * STEP


def nearest_codes(latent: Tensor, bits: int) -> Tensor:
    """The codes nearest to latent ones, in their dtype."""
    return latent.round().clamp(0, 2**bits - 1)


@moved_codes.register_fake
def _moved_codes_fake(qweight: Tensor, shift: Tensor, bits: int) -> Tensor:
    return torch.empty_like(qweight)


@torch.library.custom_op(f"{NAMESPACE}::affine_linear", mutates_args=())
def affine_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    pool: int,
    scaling: float,
) -> Tensor:
    """Y = x Wᵀ + b with the W of this module, from `[.., K]` to `[.., N]`.

    The arguments up to `group_size` are those of `group_linear`, and `pool` and `scaling` those of
    `adapted_linear`: lora_A `[r, ceil(K / pool)]`, lora_B `[N, r]`. `gain` is G, `[N, L]`, and
    `shift` U, `[N, K]`, or None where codes do not train. Floating tensors have one dtype.

    The backward keeps x, since the gradient of a scale depends on every product of x and a code.
    """
    parameters = affine_parameters(scale, offset, lora_A, lora_B, gain, pool, group_size, scaling)
    codes = qweight if shift is None else moved_codes(qweight, shift, bits)
    return linear_on_codes(x, codes, *parameters, bias, bits, group_size)


@affine_linear.register_fake
def _affine_linear_fake(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@view_of(affine_linear)
@dataclass(frozen=True)
class AffineLinear(LinearOnCodes):
    """A node of `affine_linear`."""

    lora_A: fx.Node
    lora_B: fx.Node
    gain: fx.Node
    shift: fx.Node | None
    pool: int
    scaling: float


def _affine_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, offset, _, bits, group_size, *trained, pool, scaling = inputs
    ctx.save_for_backward(x, qweight, scale, offset, *trained)
    ctx.options = (bits, group_size, pool, scaling)


def _affine_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, qweight, scale, offset, lora_a, lora_b, gain, shift = ctx.saved_tensors
    bits, group_size, pool, scaling = ctx.options
    new, moved = affine_parameters(scale, offset, lora_a, lora_b, gain, pool, group_size, scaling)
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = grad_bias = by_shift = None
    if ctx.needs_input_grad[0]:
        codes = qweight if shift is None else torch.ops.qalora.moved_codes(qweight, shift, bits)
        grad_x = torch.ops.qalora.group_linear_input_grad(
            grad, codes, new, moved, bits, group_size, x.shape[-1]
        )
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0)
    if shift is None:
        by_code = torch.ops.qalora.group_code_grad(rows, inputs, qweight, bits, group_size)
    else:
        weight_grad = (rows.t() @ inputs).to(shift.dtype)
        latent = latent_codes(qweight, shift, bits)
        near = nearest_codes(latent, bits)
        by_code = sum_groups(weight_grad * near, group_size)
        step = expand_groups(new * STEP, group_size, x.shape[-1])
        by_shift = weight_grad * step * ((latent - near).abs() <= 0.5)
    by_offset = (rows.t() @ sum_groups(inputs, group_size)).to(scale.dtype)
    by_gain = by_code.to(scale.dtype) * scale + by_offset * offset
    by_update = sum_groups(by_offset, pool // group_size).to(lora_a.dtype) * scaling
    grad_a, grad_b = lora_b.t() @ by_update, by_update @ lora_a.t()
    nothing = (None, None)
    weight = (None, None, None, grad_bias, *nothing)
    return (grad_x, *weight, grad_a, grad_b, by_gain, by_shift, *nothing)


affine_linear.register_autograd(_affine_linear_backward, setup_context=_affine_linear_setup)

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
from qalora_compile.ir.ops.linear import NAMESPACE, linear_on_codes, tile_rows
from qalora_compile.ir.ops.views import OperatorView, view_of
from qalora_compile.ir.packing.bitstream import pack_codes, unpack_codes

STEP = 16.0
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

    Args:
        scale: `[N, L]`.
        offset: `[N, L]`.
        lora_a: `[r, L']`, L' = ceil(K / pool).
        lora_b: `[N, r]`.
        gain: G, `[N, L]`.
        pool: Width of a pooling group, a multiple of `group_size`.
        group_size: g.
        scaling: What B A is multiplied by.
    """
    update = scaling * (lora_b.double() @ lora_a.double())
    factor = 1 + gain.double()
    moved = offset.double() * factor + expand_groups(update, pool // group_size, offset.shape[1])
    return (scale.double() * factor).to(scale.dtype), moved.to(scale.dtype)


@torch.library.custom_op(f"{NAMESPACE}::moved_codes", mutates_args=())
def moved_codes(qweight: Tensor, shift: Tensor, bits: int) -> Tensor:
    """q', packed: the codes nearest to q + STEP · U.

    Args:
        qweight: `[N, ceil(K / 8) · bits]` uint8.
        shift: U, `[N, K]`.
        bits: Width of a code.
    """
    levels = (_levels(qweight, shift, bits, part) for part in tile_rows(qweight, shift.shape[1]))
    most = 2**bits - 1
    return torch.cat([pack_codes(v.round_().clamp_(0, most).byte(), bits) for v in levels])


def _levels(qweight: Tensor, shift: Tensor, bits: int, part: slice) -> Tensor:
    """Rows of q + STEP · U, in the dtype of U."""
    codes = unpack_codes(qweight[part], bits, shift.shape[1]).to(shift.dtype)
    return codes + shift[part] * STEP


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

    Args:
        x: `[.., K]`, floating.
        qweight: `[N, ceil(K / 8) · bits]` uint8, see `packing`.
        scale: `[N, L]`, float32 or float64.
        offset: `[N, L]`, as `scale`.
        bias: `[N]` or None.
        bits: Width of a code.
        group_size: g; L = ceil(K / g).
        lora_A: `[r, L']`, L' = ceil(K / pool).
        lora_B: `[N, r]`.
        gain: G, `[N, L]`.
        shift: U, `[N, K]`, or None: codes do not train.
        pool: Width of a pooling group, a multiple of g.
        scaling: alpha / rank times the pooling factor f.

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
class AffineLinear(OperatorView):
    """A node of `affine_linear`."""

    x: fx.Node
    qweight: fx.Node
    scale: fx.Node
    offset: fx.Node
    bias: fx.Node | None
    bits: int
    group_size: int
    lora_A: fx.Node
    lora_B: fx.Node
    gain: fx.Node
    shift: fx.Node | None
    pool: int
    scaling: float


@torch.library.custom_op(f"{NAMESPACE}::moved_code_grad", mutates_args=())
def moved_code_grad(
    grad: Tensor,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    shift: Tensor,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `affine_linear` by scale', `[N, L]`, and by U, `[N, K]`.

    Args:
        grad: `[M, N]`.
        x: `[M, K]`.
        qweight: q, `[N, ceil(K / 8) · bits]` uint8.
        scale: scale', `[N, L]`.
        shift: U, `[N, K]`.
        bits: Width of a code.
        group_size: g.
    """
    k, most, by_code = x.shape[-1], 2**bits - 1, []
    by_shift = torch.empty_like(shift)
    for part in tile_rows(qweight, k):
        weight_grad = (grad[:, part].t() @ x).to(shift.dtype)
        level = _levels(qweight, shift, bits, part)
        inside = (level >= -0.5) & (level <= most + 0.5)
        by_code.append(sum_groups(weight_grad * level.round().clamp(0, most), group_size))
        step = expand_groups(scale[part] * STEP, group_size, k)
        by_shift[part] = weight_grad * step * inside
    return torch.cat(by_code), by_shift


@moved_code_grad.register_fake
def _moved_code_grad_fake(
    grad: Tensor, x: Tensor, qweight: Tensor, scale: Tensor, shift: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return shift.new_empty(scale.shape), torch.empty_like(shift)


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
        by_code, by_shift = torch.ops.qalora.moved_code_grad(
            rows, inputs, qweight, new, shift, bits, group_size
        )
    by_offset = (rows.t() @ sum_groups(inputs, group_size)).to(scale.dtype)
    by_gain = by_code.to(scale.dtype) * scale + by_offset * offset
    by_update = sum_groups(by_offset, pool // group_size).to(lora_a.dtype) * scaling
    grad_a, grad_b = lora_b.t() @ by_update, by_update @ lora_a.t()
    nothing = (None, None)
    weight = (None, None, None, grad_bias, *nothing)
    return (grad_x, *weight, grad_a, grad_b, by_gain, by_shift, *nothing)


affine_linear.register_autograd(_affine_linear_backward, setup_context=_affine_linear_setup)

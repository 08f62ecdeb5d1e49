"""`qalora::integer_zero_linear`: a quantized layer that trains with integer zero-points.

Some runtimes only take integer zero-points. Two kinds of adapters keep them integers:

* `integer`: the zero-point of Algorithm 1 (arXiv 2309.14717), rounded to a code in each forward:
  `z' = round(z − scaling · (B A) / scale)`. The backward treats the rounding as the identity
  between 0 and 2^bits − 1 (straight-through estimator, arXiv 1308.3432), and as a constant beyond.
* `scale`: zero-points stay, and `scale' = scale · (1 + scaling · (B A))` (after PEQA, arXiv
  2305.14152, which trains all scales without a low rank).

Scales keep 16 significant bits, so that `scale · z` is exact and `−offset / scale` recovers z. The
forward computes with exactly the numbers that folding stores, so the deployed model is the trained
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.affine import sum_groups
from qalora_compile.ir.ops.linear import NAMESPACE, LinearOnCodes, linear_on_codes, tile_rows
from qalora_compile.ir.ops.views import view_of
from qalora_compile.ir.packing.bitstream import unpack_codes

INTEGER, SCALE = "integer", "scale"
KINDS = (INTEGER, SCALE)
_SCALE_BITS = {torch.float32: 16, torch.float64: 45}
"""Significant bits of a scale: its product with an 8-bit zero-point is then exact in the dtype."""


def shorten(values: Tensor, dtype: torch.dtype, *, up: bool = False) -> Tensor:
    """Float64 values, rounded to nearest or up, to the bits that a scale of `dtype` keeps."""
    bits = _SCALE_BITS[dtype]
    mantissa, exponent = torch.frexp(values)
    level = mantissa * 2.0**bits
    return torch.ldexp((level.ceil() if up else level.round()) / 2.0**bits, exponent)


def zero_points(scale: Tensor, offset: Tensor) -> Tensor:
    """The integer zero-points that the offsets encode, float64 `[N, L]`."""
    return (-offset.double() / scale.double()).round()


def moved_zero_points(scale: Tensor, offset: Tensor, update: Tensor) -> Tensor:
    """`z − update / scale`, before it is rounded, float64 `[N, L]`."""
    return zero_points(scale, offset) - update / scale.double()


def largest_zero_points(scale: Tensor, bits: int) -> Tensor:
    """The largest integer that a zero-point may become, float64 `[N, L]`: 2^bits − 1, or 1.

    A group of equal weights uses that weight, with all of its bits, as the scale, so that it
    dequantizes exactly. Such a scale times 0 or 1 is exact; times another integer it may not be.
    """
    is_short = shorten(scale.double(), scale.dtype) == scale
    return torch.where(is_short, 2.0**bits - 1, 1.0)


def integer_zero_parameters(
    scale: Tensor,
    offset: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bits: int,
    scaling: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Scale and offset that an adapter of one of the `KINDS` gives, in the dtype of `scale`.

    Args:
        scale: `[N, L]`, none 0, with 16 significant bits (45 in float64), or the one weight of a
            group of equal weights.
        offset: `[N, L]`, −scale times an integer from 0 to `largest_zero_points`.
        lora_a: `[r, L]`.
        lora_b: `[N, r]`.
        bits: Width of a code.
        scaling: What B A is multiplied by.
        kind: `"integer"` or `"scale"`.
    """
    update = scaling * (lora_b.double() @ lora_a.double())
    if kind == SCALE:
        new = shorten(scale.double() * (1 + update), scale.dtype)
        return new.to(scale.dtype), (-new * zero_points(scale, offset)).to(scale.dtype)
    zero = moved_zero_points(scale, offset, update).round().clamp_min(0)
    zero = zero.minimum(largest_zero_points(scale, bits))
    return scale, (-scale.double() * zero).to(scale.dtype)


@torch.library.custom_op(f"{NAMESPACE}::integer_zero_linear", mutates_args=())
def integer_zero_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    kind: str,
) -> Tensor:
    """Y = x Wᵀ + b, `W = scale' · q + offset'`, from `[.., K]` to `[.., N]`.

    Scale' and offset' are those of `integer_zero_parameters`.

    Args:
        x: `[.., K]`, floating.
        qweight: `[N, ceil(K / 8) · bits]` uint8, see `packing`.
        scale: `[N, L]`, float32 or float64.
        offset: `[N, L]`, as `scale`.
        bias: `[N]` or None.
        bits: Width of a code.
        group_size: g; L = ceil(K / g).
        lora_A: `[r, L]`.
        lora_B: `[N, r]`.
        scaling: alpha / rank times the pooling factor f.
        kind: `"integer"` or `"scale"`.

    For `"scale"` the backward keeps x, since the gradient of a scale depends on every product of x
    and a code. For `"integer"` the sums S(x) suffice.
    """
    weight = integer_zero_parameters(scale, offset, lora_A, lora_B, bits, scaling, kind)
    return linear_on_codes(x, qweight, *weight, bias, bits, group_size)


@integer_zero_linear.register_fake
def _integer_zero_linear_fake(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@view_of(integer_zero_linear)
@dataclass(frozen=True)
class IntegerZeroLinear(LinearOnCodes):
    """A node of `integer_zero_linear`."""

    lora_A: fx.Node
    lora_B: fx.Node
    scaling: float
    kind: str


@torch.library.custom_op(f"{NAMESPACE}::group_code_grad", mutates_args=())
def group_code_grad(grad: Tensor, x: Tensor, qweight: Tensor, bits: int, group_size: int) -> Tensor:
    """Gradient of `group_linear` by its scales: sums of `(gradᵀ x) · q` in each group, `[N, L]`.

    Args:
        grad: `[M, N]`.
        x: `[M, K]`.
        qweight: `[N, ceil(K / 8) · bits]` uint8.
        bits: Width of a code.
        group_size: g.
    """
    k = x.shape[-1]
    parts = []
    for part in tile_rows(qweight, k):
        weight_grad = grad[:, part].t() @ x
        weight_grad.mul_(unpack_codes(qweight[part], bits, k))
        parts.append(sum_groups(weight_grad, group_size))
    return torch.cat(parts)


@group_code_grad.register_fake
def _group_code_grad_fake(
    grad: Tensor, x: Tensor, qweight: Tensor, bits: int, group_size: int
) -> Tensor:
    return grad.new_empty(qweight.shape[0], -(-x.shape[-1] // group_size))


def _integer_zero_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, offset, _, bits, group_size, lora_a, lora_b, scaling, kind = inputs
    rows = x.reshape(-1, x.shape[-1])
    kept = rows if kind == SCALE else sum_groups(rows, group_size)
    ctx.save_for_backward(qweight, scale, offset, lora_a, lora_b, kept)
    ctx.options = (bits, group_size, scaling, kind, x.shape[-1])


def _integer_zero_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scale, offset, lora_a, lora_b, kept = ctx.saved_tensors
    bits, group_size, scaling, kind, k = ctx.options
    weight = integer_zero_parameters(scale, offset, lora_a, lora_b, bits, scaling, kind)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_bias = grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qalora.group_linear_input_grad(
            grad, qweight, *weight, bits, group_size, k
        )
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0)
    if ctx.needs_input_grad[7] or ctx.needs_input_grad[8]:
        if kind == SCALE:
            by_code = torch.ops.qalora.group_code_grad(rows, kept, qweight, bits, group_size)
            by_offset = rows.t() @ sum_groups(kept, group_size)
            by_scale = by_code - zero_points(scale, offset).to(rows.dtype) * by_offset
            by_update = by_scale.to(scale.dtype) * scale
        else:
            update = scaling * (lora_b.double() @ lora_a.double())
            moved = moved_zero_points(scale, offset, update)
            inside = (moved >= -0.5) & (moved <= largest_zero_points(scale, bits) + 0.5)
            by_update = (rows.t() @ kept).to(scale.dtype) * inside
        by_update = by_update.to(lora_a.dtype) * scaling
        grad_a, grad_b = lora_b.t() @ by_update, by_update @ lora_a.t()
    return grad_x, None, None, None, grad_bias, None, None, grad_a, grad_b, None, None


integer_zero_linear.register_autograd(
    _integer_zero_linear_backward, setup_context=_integer_zero_linear_setup
)

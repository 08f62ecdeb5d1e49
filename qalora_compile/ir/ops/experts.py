"""The operators on stacked experts, registered as `torch.ops.qalora.*`: one matrix per expert.

They have two forms. With `group_offsets`, the rows of x `[T, K]` are sorted by expert and
`group_offsets` `[E]` holds the row at which each expert's rows end, as in `torch._grouped_mm`; rows
after the last one give zeros. Without, x is `[E, T, K]`, some rows per expert, as in `torch.bmm`.

=====================  ============================================================================
`expert_linear`        y = x W_eᵀ, W_e = scale · q + offset from packed codes
`expert_adapter`       d = scaling · (p A_eᵀ) B_eᵀ
`expert_matmul_nbits`  ONNX Runtime's MatMulNBits for each expert, with the correction of its groups
=====================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.ops.linear import (
    NAMESPACE,
    dequantize_like,
    input_grad_fake,
    matmul_nbits_weight,
)
from qalora_compile.ir.ops.views import OperatorView, view_of


def by_expert(
    x: Tensor,
    group_offsets: Tensor | None,
    experts: int,
    width: int,
    compute: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Apply `compute(e, rows)` to the rows of each expert; the result has `width` columns."""
    y = x.new_zeros(*x.shape[:-1], width)
    for expert, rows in enumerate(_rows(group_offsets, experts)):
        if group_offsets is None:
            y[expert] = compute(expert, x[expert])
        elif rows.stop > rows.start:
            y[rows] = compute(expert, x[rows])
    return y


def add_corrections(
    y: Tensor, sums: Tensor | None, correction: list[Tensor], group_offsets: Tensor | None
) -> Tensor:
    """Y + S(x) C_e for each expert's rows; y itself if there are no sums."""
    if sums is None:
        return y
    width = y.shape[-1]
    return y + by_expert(
        sums, group_offsets, len(correction), width, lambda e, rows: rows @ correction[e]
    )


def _rows(group_offsets: Tensor | None, experts: int) -> list[slice]:
    """The rows of each expert; placeholders where every expert has its own rows."""
    if group_offsets is None:
        return [slice(0, 0)] * experts
    stops = [int(end) for end in group_offsets.tolist()]
    return [slice(a, b) for a, b in zip([0, *stops[:-1]], stops, strict=True)]


@torch.library.custom_op(f"{NAMESPACE}::expert_linear", mutates_args=())
def expert_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    group_offsets: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Y = x W_eᵀ with `W_e = scale_e · q_e + offset_e` (arXiv 2309.14717, Eq. 1).

    Args:
        x: `[T, K]` with `group_offsets`, else `[E, T, K]`.
        qweight: `[E, N, ceil(K / 8) · bits]` uint8, see `packing`.
        scale: `[E, N, L]`, float32 or float64.
        offset: `[E, N, L]`, as `scale`.
        group_offsets: `[E]` integers, or None.
        bits: Width of a code.
        group_size: g; L = ceil(K / g).
    """

    def compute(expert: int, rows: Tensor) -> Tensor:
        parts = qweight[expert], scale[expert], offset[expert]
        return rows @ dequantize_like(x, *parts, bits, group_size, x.shape[-1]).t()

    return by_expert(x, group_offsets, qweight.shape[0], qweight.shape[1], compute)


@expert_linear.register_fake
def _expert_linear_fake(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[1])


@view_of(expert_linear)
@dataclass(frozen=True)
class ExpertLinear(OperatorView):
    """A node of `expert_linear`."""

    x: fx.Node
    qweight: fx.Node
    scale: fx.Node
    offset: fx.Node
    group_offsets: fx.Node | None
    bits: int
    group_size: int


@torch.library.custom_op(f"{NAMESPACE}::expert_linear_input_grad", mutates_args=())
def expert_linear_input_grad(
    grad: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    group_offsets: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """Gradient of `expert_linear` by x: `grad W_e`."""

    def compute(expert: int, rows: Tensor) -> Tensor:
        parts = qweight[expert], scale[expert], offset[expert]
        return rows @ dequantize_like(grad, *parts, bits, group_size, k)

    return by_expert(grad, group_offsets, qweight.shape[0], k, compute)


expert_linear_input_grad.register_fake(input_grad_fake)


def _expert_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, offset, group_offsets, bits, group_size = inputs
    ctx.save_for_backward(qweight, scale, offset, group_offsets)
    ctx.options = (bits, group_size, x.shape[-1])


def _expert_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qalora.expert_linear_input_grad(grad, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, None, None, None, None, None


expert_linear.register_autograd(_expert_linear_backward, setup_context=_expert_linear_setup)


@torch.library.custom_op(f"{NAMESPACE}::expert_adapter", mutates_args=())
def expert_adapter(
    pooled: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    group_offsets: Tensor | None,
    scaling: float,
) -> Tensor:
    """D = scaling · (p A_eᵀ) B_eᵀ: an adapter for each expert (arXiv 2309.14717, Algorithm 1).

    Args:
        pooled: p = S(x), `[T, L]` with `group_offsets`, else `[E, T, L]`.
        lora_A: `[E, r, L]`.
        lora_B: `[E, N, r]`.
        group_offsets: As for `expert_linear`.
        scaling: alpha / rank times the pooling factor f.
    """

    def compute(expert: int, rows: Tensor) -> Tensor:
        return rows.to(lora_A.dtype) @ lora_A[expert].t() @ lora_B[expert].t() * scaling

    return by_expert(pooled, group_offsets, lora_A.shape[0], lora_B.shape[1], compute)


@expert_adapter.register_fake
def _expert_adapter_fake(pooled: Tensor, lora_A: Tensor, lora_B: Tensor, *_: Any) -> Tensor:
    return pooled.new_empty(*pooled.shape[:-1], lora_B.shape[1])


@view_of(expert_adapter)
@dataclass(frozen=True)
class ExpertAdapter(OperatorView):
    """A node of `expert_adapter`."""

    pooled: fx.Node
    lora_A: fx.Node
    lora_B: fx.Node
    group_offsets: fx.Node | None
    scaling: float


@torch.library.custom_op(f"{NAMESPACE}::expert_adapter_grads", mutates_args=())
def expert_adapter_grads(
    grad: Tensor,
    pooled: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    group_offsets: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `expert_adapter` by pooled, A and B."""
    experts = lora_A.shape[0]
    grad_pooled = torch.zeros_like(pooled)
    grad_a, grad_b = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    for expert, rows in enumerate(_rows(group_offsets, experts)):
        place: int | slice = expert if group_offsets is None else rows
        p, g = pooled[place].to(lora_A.dtype), grad[place].to(lora_A.dtype) * scaling
        hidden = g @ lora_B[expert]
        grad_pooled[place] = (hidden @ lora_A[expert]).to(pooled.dtype)
        grad_a[expert] = hidden.t() @ p
        grad_b[expert] = g.t() @ (p @ lora_A[expert].t())
    return grad_pooled, grad_a, grad_b


@expert_adapter_grads.register_fake
def _expert_adapter_grads_fake(
    grad: Tensor, pooled: Tensor, lora_A: Tensor, lora_B: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(pooled), torch.empty_like(lora_A), torch.empty_like(lora_B)


def _expert_adapter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pooled, lora_a, lora_b, group_offsets, ctx.scaling = inputs
    ctx.save_for_backward(pooled, lora_a, lora_b, group_offsets)


def _expert_adapter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.qalora.expert_adapter_grads(grad, *ctx.saved_tensors, ctx.scaling)
    return *grads, None, None


expert_adapter.register_autograd(_expert_adapter_backward, setup_context=_expert_adapter_setup)


@torch.library.custom_op(f"{NAMESPACE}::expert_matmul_nbits", mutates_args=())
def expert_matmul_nbits(
    x: Tensor,
    sums: Tensor | None,
    qweight: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    correction: list[Tensor],
    group_offsets: Tensor | None,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    """Y = x W_eᵀ + S(x) C_e, `W_e = scale · (q − zero_point)` with integer zero-points.

    Args:
        x: `[T, K]` with `group_offsets`, else `[E, T, K]`.
        sums: S(x), `[.., L]`, or None where there is no correction.
        qweight: Of each expert `[N, Lb, block_size · bits / 8]` uint8, Lb = ceil(K / block_size).
        scale: Of each expert `[N, Lb]`, in the dtype of x.
        zero_point: Of each expert `[N, ceil(Lb · bits / 8)]` uint8.
        correction: C_e of each expert, `[L, N]`; empty where there is no correction.
        group_offsets: As for `expert_linear`.
        bits: 2, 4 or 8.
        block_size: A power of two, 16 or more.
        accuracy_level: MatMulNBits attribute.
    """

    def multiply(expert: int, rows: Tensor) -> Tensor:
        parts = qweight[expert], scale[expert], zero_point[expert]
        return rows @ matmul_nbits_weight(*parts, bits, block_size, x.shape[-1]).to(x.dtype).t()

    y = by_expert(x, group_offsets, len(qweight), qweight[0].shape[0], multiply)
    return add_corrections(y, sums, correction, group_offsets)


@expert_matmul_nbits.register_fake
def _expert_matmul_nbits_fake(
    x: Tensor, sums: Tensor | None, qweight: list[Tensor], *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight[0].shape[0])


@view_of(expert_matmul_nbits)
@dataclass(frozen=True)
class ExpertMatmulNBits(OperatorView):
    """A node of `expert_matmul_nbits`."""

    x: fx.Node
    sums: fx.Node | None
    qweight: Sequence[fx.Node]
    scale: Sequence[fx.Node]
    zero_point: Sequence[fx.Node]
    correction: Sequence[fx.Node]
    group_offsets: fx.Node | None
    bits: int
    block_size: int
    accuracy_level: int

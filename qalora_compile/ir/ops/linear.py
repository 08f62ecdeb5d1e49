"""The operators of quantized linear layers, registered as `torch.ops.qalora.*`.

Each has a schema, a plain-torch reference (the function body), a fake kernel and, where gradients
pass, a hand-written backward. The tests run `torch.library.opcheck` on all of them.

=====================  ============================================================================
`group_linear`         y = x Wᵀ + b, W = scale · q + offset from packed codes
`group_sum`            S(x): `[.., K]` to `[.., L]`
`pooled_adapter`       d = scaling · (p Aᵀ) Bᵀ
`pad_groups`           x with every group zero-padded to a wider one: `[.., K]` to `[.., L · width]`
`matmul_nbits`         ONNX Runtime's MatMulNBits with integer zero-points
=====================  ============================================================================

`adapted_linear`, `affine_linear` and `integer_zero_linear` have files of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.ir.affine import dequantize, expand_groups, group_count, sum_groups
from qalora_compile.ir.ops.views import OperatorView, view_of
from qalora_compile.ir.packing.bitstream import packed_width, unpack_codes

NAMESPACE = "qalora"


def dequantize_like(
    like: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int, k: int
) -> Tensor:
    """W `[N, K]` in the dtype of `like`, computed no narrower than `scale` or `like`."""
    if like.dtype == torch.float64 and scale.dtype != torch.float64:
        scale, offset = scale.double(), offset.double()
    return dequantize(packed, scale, offset, bits=bits, group_size=group_size, k=k).to(like.dtype)


_TILE_ELEMENTS = {"cpu": 1 << 20}
_TILE_ELSEWHERE = 1 << 24
"""About so many weights are dequantized at a time: they stay in a core's cache, and the copy does
not grow with the layer. Accelerators want larger products."""


def tile_rows(packed: Tensor, k: int) -> Iterator[slice]:
    """The rows of a weight `[N, K]` in tiles."""
    rows = max(1, _TILE_ELEMENTS.get(packed.device.type, _TILE_ELSEWHERE) // k)
    return (slice(start, start + rows) for start in range(0, packed.shape[0], rows))


def weight_tiles(
    like: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int, k: int
) -> Iterator[tuple[slice, Tensor]]:
    """W in tiles of rows, `[n, K]` in the dtype of `like`, each with its place in `[N, K]`."""
    for part in tile_rows(packed, k):
        parameters = packed[part], scale[part], offset[part]
        yield part, dequantize_like(like, *parameters, bits, group_size, k)


def linear_on_codes(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Y = x Wᵀ + b, `[.., K]` to `[.., N]`, tile by tile."""
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(*x.shape[:-1], packed.shape[0])  # not a view: Llama 4 writes into the result
    flat = y.view(len(rows), packed.shape[0])
    for part, weight in weight_tiles(x, packed, scale, offset, bits, group_size, x.shape[-1]):
        torch.mm(rows, weight.t(), out=flat[:, part])
    if bias is not None:
        y += bias
    return y


def input_grad_on_codes(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """`grad W`, `[.., N]` to `[.., K]`, tile by tile."""
    rows = grad.reshape(-1, grad.shape[-1])
    total = grad.new_zeros(rows.shape[0], k)
    for part, weight in weight_tiles(grad, packed, scale, offset, bits, group_size, k):
        total.addmm_(rows[:, part], weight)
    return total.reshape(*grad.shape[:-1], k)


@torch.library.custom_op(f"{NAMESPACE}::group_linear", mutates_args=())
def group_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Y = x Wᵀ + b with `W = scale · q + offset` (arXiv 2309.14717, Eq. 1).

    Args:
        x: `[.., K]`, floating.
        qweight: `[N, ceil(K / 8) · bits]` uint8, see `packing`.
        scale: `[N, L]`, float32 or float64.
        offset: `[N, L]`, as `scale`.
        bias: `[N]` or None.
        bits: Width of a code.
        group_size: g; L = ceil(K / g).

    The backward recomputes W and keeps only the packed weight. It keeps x too where scale or offset
    take gradients, which those of a frozen base do not.
    """
    return linear_on_codes(x, qweight, scale, offset, bias, bits, group_size)


@group_linear.register_fake
def _group_linear_fake(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@dataclass(frozen=True)
class LinearOnCodes(OperatorView):
    """What the operators of quantized layers have in common: `group_linear`'s operands."""

    x: fx.Node
    qweight: fx.Node
    scale: fx.Node
    offset: fx.Node
    bias: fx.Node | None
    bits: int
    group_size: int

    @property
    def weight(self) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None, int, int]:
        """All of these operands but x."""
        return self.qweight, self.scale, self.offset, self.bias, self.bits, self.group_size


@view_of(group_linear)
@dataclass(frozen=True)
class GroupLinear(LinearOnCodes):
    """A node of `group_linear`."""


@torch.library.custom_op(f"{NAMESPACE}::group_linear_input_grad", mutates_args=())
def group_linear_input_grad(
    grad: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """Gradient of `group_linear` by x: `grad W`, `[.., N]` to `[.., K]`."""
    return input_grad_on_codes(grad, qweight, scale, offset, bits, group_size, k)


@group_linear_input_grad.register_fake
def input_grad_fake(grad: Tensor, *operands: Any) -> Tensor:
    """The gradient by x of a layer, `[.., N]` to `[.., K]`; the last operand is K."""
    return grad.new_empty(*grad.shape[:-1], operands[-1])


def _group_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, offset, _, bits, group_size = inputs
    kept = [x] if any(ctx.needs_input_grad[2:4]) else []
    ctx.save_for_backward(qweight, scale, offset, *kept)
    ctx.options = (bits, group_size, x.shape[-1])


def _group_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = grad_scale = grad_offset = None
    qweight, scale, offset, *kept = ctx.saved_tensors
    bits, group_size, k = ctx.options
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qalora.group_linear_input_grad(
            grad, qweight, scale, offset, *ctx.options
        )
    if ctx.needs_input_grad[2]:
        x = kept[0].reshape(-1, k)
        by_code = torch.ops.qalora.group_code_grad(rows, x, qweight, bits, group_size)
        grad_scale = by_code.to(scale.dtype)
    if ctx.needs_input_grad[3]:
        sums = sum_groups(kept[0].reshape(-1, k), group_size)
        grad_offset = (rows.t() @ sums).to(offset.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0)
    return grad_x, None, grad_scale, grad_offset, grad_bias, None, None


group_linear.register_autograd(_group_linear_backward, setup_context=_group_linear_setup)


@torch.library.custom_op(f"{NAMESPACE}::group_sum", mutates_args=())
def group_sum(x: Tensor, group_size: int) -> Tensor:
    """S(x): sums of x inside each group of `group_size`; `[.., K]` to `[.., ceil(K / g)]`."""
    return sum_groups(x, group_size)


@group_sum.register_fake
def _group_sum_fake(x: Tensor, group_size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], group_count(x.shape[-1], group_size))


@view_of(group_sum)
@dataclass(frozen=True)
class GroupSum(OperatorView):
    """A node of `group_sum`."""

    x: fx.Node
    group_size: int


def _group_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.group_size = inputs
    ctx.k = x.shape[-1]


def _group_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return expand_groups(grad, ctx.group_size, ctx.k), None


group_sum.register_autograd(_group_sum_backward, setup_context=_group_sum_setup)


@torch.library.custom_op(f"{NAMESPACE}::pooled_adapter", mutates_args=())
def pooled_adapter(pooled: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """D = scaling · (p Aᵀ) Bᵀ (arXiv 2309.14717, Algorithm 1).

    Args:
        pooled: p = S(x), `[.., L]`.
        lora_A: `[r, L]`.
        lora_B: `[N, r]`.
        scaling: alpha / rank times the pooling factor f.

    Computed in the dtype of the adapter; the result has the dtype of `pooled`.
    """
    hidden = functional.linear(pooled.to(lora_A.dtype), lora_A)
    return (functional.linear(hidden, lora_B) * scaling).to(pooled.dtype)


@pooled_adapter.register_fake
def _pooled_adapter_fake(pooled: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return pooled.new_empty(*pooled.shape[:-1], lora_B.shape[0])


@view_of(pooled_adapter)
@dataclass(frozen=True)
class PooledAdapter(OperatorView):
    """A node of `pooled_adapter`."""

    pooled: fx.Node
    lora_A: fx.Node
    lora_B: fx.Node
    scaling: float


def _pooled_adapter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pooled, lora_a, lora_b, ctx.scaling = inputs
    ctx.save_for_backward(pooled, lora_a, lora_b)


def _pooled_adapter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pooled, lora_a, lora_b = ctx.saved_tensors
    grad_out = grad.to(lora_a.dtype) * ctx.scaling
    grad_hidden = grad_out @ lora_b
    rows = pooled.to(lora_a.dtype).reshape(-1, pooled.shape[-1])
    grad_pooled = grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_pooled = (grad_hidden @ lora_a).to(pooled.dtype)
    if ctx.needs_input_grad[1]:
        grad_a = grad_hidden.reshape(-1, lora_a.shape[0]).t() @ rows
    if ctx.needs_input_grad[2]:
        hidden = functional.linear(rows, lora_a)
        grad_b = grad_out.reshape(-1, lora_b.shape[0]).t() @ hidden
    return grad_pooled, grad_a, grad_b, None


pooled_adapter.register_autograd(_pooled_adapter_backward, setup_context=_pooled_adapter_setup)


@torch.library.custom_op(f"{NAMESPACE}::pad_groups", mutates_args=())
def pad_groups(x: Tensor, group_size: int, width: int) -> Tensor:
    """Zero-pad every group of x to `width`: `[.., K]` to `[.., L · width]`.

    This lets a kernel with a fixed set of block sizes compute any group size: the added zeros are
    multiplied by padding codes and contribute nothing.
    """
    groups = group_count(x.shape[-1], group_size)
    padded = functional.pad(x, (0, groups * group_size - x.shape[-1]))
    grouped = padded.unflatten(-1, (groups, group_size))
    return functional.pad(grouped, (0, width - group_size)).flatten(-2)


@pad_groups.register_fake
def _pad_groups_fake(x: Tensor, group_size: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], group_count(x.shape[-1], group_size) * width)


@view_of(pad_groups)
@dataclass(frozen=True)
class PadGroups(OperatorView):
    """A node of `pad_groups`."""

    x: fx.Node
    group_size: int
    width: int


@torch.library.custom_op(f"{NAMESPACE}::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    """Y = x Wᵀ + b, `W = scale · (q − zero_point)` with integer zero-points.

    The reference of ONNX Runtime's `com.microsoft::MatMulNBits` (contrib operator, version 1),
    always computed exactly: `accuracy_level` is only passed on to the exported node.

    Args:
        x: `[.., K]`.
        qweight: `[N, Lb, block_size · bits / 8]` uint8, Lb = ceil(K / block_size).
        scale: `[N, Lb]`, in the dtype of x.
        zero_point: `[N, ceil(Lb · bits / 8)]` uint8, packed like the codes.
        bias: `[N]` or None.
        bits: 2, 4 or 8.
        block_size: A power of two, 16 or more.
        accuracy_level: MatMulNBits attribute.
    """
    weight = matmul_nbits_weight(qweight, scale, zero_point, bits, block_size, x.shape[-1])
    return functional.linear(x, weight.to(x.dtype), bias)


def matmul_nbits_weight(
    qweight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, block_size: int, k: int
) -> Tensor:
    """W `[N, K]` of MatMulNBits, at float32 or the wider dtype of `scale`."""
    blocks = qweight.shape[1]
    codes = unpack_codes(qweight.flatten(1), bits, blocks * block_size)
    zero = unpack_codes(pad_zero_point(zero_point, blocks, bits), bits, blocks)
    wide = torch.promote_types(scale.dtype, torch.float32)
    level = codes.to(wide).unflatten(1, (blocks, block_size)) - zero.to(wide)[..., None]
    weight: Tensor = (level * scale.to(wide)[..., None]).flatten(1)[:, :k]
    return weight


def pad_zero_point(zero_point: Tensor, blocks: int, bits: int) -> Tensor:
    """Pad rows of MatMulNBits zero-points, full bytes, to the rows that `packing` expects."""
    return functional.pad(zero_point, (0, packed_width(blocks, bits) - zero_point.shape[1]))


@matmul_nbits.register_fake
def _matmul_nbits_fake(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@view_of(matmul_nbits)
@dataclass(frozen=True)
class MatmulNBits(OperatorView):
    """A node of `matmul_nbits`."""

    x: fx.Node
    qweight: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    bias: fx.Node | None
    bits: int
    block_size: int
    accuracy_level: int

"""Operators of single targets, for lowered programs, registered as `torch.ops.qalora.*`.

=============================  ====================================================================
`group_quant_linear`           target `ort`: the node `qalora::GroupQuantLinear`
`expert_group_quant_linear`    the same for each expert
`matmul_blocks`                target `onnx`: x by a weight from blocked DequantizeLinear
`expert_matmul_blocks`         the same for each expert, with the correction of its groups
=============================  ====================================================================

Each has a plain-torch reference and a fake kernel, and no gradient: lowered programs do not train.
The operators that targets share (`matmul_nbits`, `pad_groups`) are in `ops.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.ir.ops.experts import add_corrections, by_expert
from qalora_compile.ir.ops.linear import NAMESPACE
from qalora_compile.ir.ops.views import OperatorView, view_of
from qalora_compile.ir.packing.bitstream import packed_width, unpack_codes
from qalora_compile.ir.packing.kernel_layouts import unpack_groups


def group_quant_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, k: int
) -> Tensor:
    """W = scale · (q − zero_point), `[N, K]`, at float32 or the wider dtype of `scale`."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    values = unpack_groups(codes, bits=bits, group_size=group_size, k=k).to(wide)
    expanded = [t.to(wide).repeat_interleave(group_size, dim=1)[:, :k] for t in (scale, zero_point)]
    weight: Tensor = (values - expanded[1]) * expanded[0]
    return weight


@torch.library.custom_op(f"{NAMESPACE}::group_quant_linear", mutates_args=())
def group_quant_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    compute: str,
) -> Tensor:
    """Y = x Wᵀ, `W = scale · (q − zero_point)` with real-valued zero-points.

    The reference of the operator `qalora::GroupQuantLinear` (docs/reference/operators.md), always
    computed exactly: `compute` is only passed on to the exported node.

    Args:
        x: `[.., K]`.
        codes: `[N, L, group_size · bits / 8]` uint8, see `packing.kernel_layouts`.
        scale: `[N, L]`, float32 or float16.
        zero_point: `[N, L]`, as `scale`.
        bits: 2, 3, 4 or 8.
        group_size: A multiple of 16.
        compute: `"fp32"`, `"int16"` or `"int8"`.
    """
    weight = group_quant_weight(codes, scale, zero_point, bits, group_size, x.shape[-1])
    return functional.linear(x, weight.to(x.dtype))


@group_quant_linear.register_fake
def _group_quant_linear_fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@view_of(group_quant_linear)
@dataclass(frozen=True)
class GroupQuantLinear(OperatorView):
    """A node of `group_quant_linear`."""

    x: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    bits: int
    group_size: int
    compute: str


@torch.library.custom_op(f"{NAMESPACE}::expert_group_quant_linear", mutates_args=())
def expert_group_quant_linear(
    x: Tensor,
    codes: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    group_offsets: Tensor | None,
    bits: int,
    group_size: int,
    compute: str,
) -> Tensor:
    """`group_quant_linear` of each expert's rows; `group_offsets` as for `expert_linear`."""

    def multiply(expert: int, rows: Tensor) -> Tensor:
        parts = codes[expert], scale[expert], zero_point[expert]
        return rows @ group_quant_weight(*parts, bits, group_size, x.shape[-1]).to(x.dtype).t()

    return by_expert(x, group_offsets, len(codes), codes[0].shape[0], multiply)


@expert_group_quant_linear.register_fake
def _expert_group_quant_linear_fake(x: Tensor, codes: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes[0].shape[0])


@view_of(expert_group_quant_linear)
@dataclass(frozen=True)
class ExpertGroupQuantLinear(OperatorView):
    """A node of `expert_group_quant_linear`."""

    x: fx.Node
    codes: Sequence[fx.Node]
    scale: Sequence[fx.Node]
    zero_point: Sequence[fx.Node]
    group_offsets: fx.Node | None
    bits: int
    group_size: int
    compute: str


def flat_width(count: int, bits: int) -> int:
    """Bytes that hold `count` codes as one bit stream, as ONNX stores tensors of small integers."""
    return -(-count * bits // 8)


def blocks_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, block_size: int, k: int
) -> Tensor:
    """W `[K, N]` of blocked DequantizeLinear along axis 0, in the dtype of `scale`."""
    blocks, n = scale.shape
    values = _unpack_flat(codes, bits, k * n).view(k, n).to(scale.dtype)
    zero = _unpack_flat(zero_point, bits, blocks * n).view(blocks, n).to(scale.dtype)
    expanded = [t.repeat_interleave(block_size, dim=0)[:k] for t in (scale, zero)]
    weight: Tensor = (values - expanded[1]) * expanded[0]
    return weight


def _unpack_flat(packed: Tensor, bits: int, count: int) -> Tensor:
    row = functional.pad(packed, (0, packed_width(count, bits) - packed.shape[0]))
    return unpack_codes(row[None], bits, count)[0]


@torch.library.custom_op(f"{NAMESPACE}::matmul_blocks", mutates_args=())
def matmul_blocks(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, block_size: int
) -> Tensor:
    """Y = x W, W `[K, N]` as ONNX's DequantizeLinear gives it (opset 21, axis 0, `block_size`).

    Args:
        x: `[.., K]`.
        codes: The `[K, N]` codes as one stream of K · N · bits bits, `[ceil(K · N · bits / 8)]`
            uint8, low bits first: the raw data of an ONNX tensor of that type.
        scale: `[Lb, N]`, in the dtype of x, Lb = ceil(K / block_size).
        zero_point: The `[Lb, N]` integer zero-points, stored as the codes.
        bits: 2, 4 or 8.
        block_size: Rows of W that share a scale.
    """
    weight = blocks_weight(codes, scale, zero_point, bits, block_size, x.shape[-1])
    return x @ weight.to(x.dtype)


@matmul_blocks.register_fake
def _matmul_blocks_fake(x: Tensor, codes: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[1])


@view_of(matmul_blocks)
@dataclass(frozen=True)
class MatmulBlocks(OperatorView):
    """A node of `matmul_blocks`."""

    x: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    bits: int
    block_size: int


@torch.library.custom_op(f"{NAMESPACE}::expert_matmul_blocks", mutates_args=())
def expert_matmul_blocks(
    x: Tensor,
    sums: Tensor | None,
    codes: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    correction: list[Tensor],
    group_offsets: Tensor | None,
    bits: int,
    block_size: int,
) -> Tensor:
    """`matmul_blocks` and S(x) C_e of each expert; `group_offsets` as for `expert_linear`."""

    def multiply(expert: int, rows: Tensor) -> Tensor:
        parts = codes[expert], scale[expert], zero_point[expert]
        return rows @ blocks_weight(*parts, bits, block_size, x.shape[-1]).to(x.dtype)

    y = by_expert(x, group_offsets, len(codes), scale[0].shape[1], multiply)
    return add_corrections(y, sums, correction, group_offsets)


@expert_matmul_blocks.register_fake
def _expert_matmul_blocks_fake(
    x: Tensor, sums: Tensor | None, codes: list[Tensor], scale: list[Tensor], *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale[0].shape[1])


@view_of(expert_matmul_blocks)
@dataclass(frozen=True)
class ExpertMatmulBlocks(OperatorView):
    """A node of `expert_matmul_blocks`."""

    x: fx.Node
    sums: fx.Node | None
    codes: Sequence[fx.Node]
    scale: Sequence[fx.Node]
    zero_point: Sequence[fx.Node]
    correction: Sequence[fx.Node]
    group_offsets: fx.Node | None
    bits: int
    block_size: int

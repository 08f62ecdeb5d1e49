"""Lookups in quantized tables, registered as `torch.ops.qalora.*`.

======================  ===========================================================================
`group_embedding`       rows of W = scale · q + offset from packed codes, as `group_linear` has them
`block_embedding`       targets `ort` and `ort-stock`: rows of the weight of their kernels
`flat_embedding`        target `onnx`: columns of a weight from blocked DequantizeLinear
======================  ===========================================================================

Each reads the same tensors as the operator that multiplies by the weight, so a head tied to an
embedding is stored once. None has a gradient: quantized tables are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.ops.linear import NAMESPACE, matmul_nbits_weight
from qalora_compile.ir.ops.target_kernels import blocks_weight, group_quant_weight
from qalora_compile.ir.ops.views import OperatorView, view_of


@torch.library.custom_op(f"{NAMESPACE}::group_embedding", mutates_args=())
def group_embedding(
    ids: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """Rows `ids` of `W = scale · q + offset` (arXiv 2309.14717, Eq. 1), `[.., K]`.

    Args:
        ids: `[..]` integers, 0 to V − 1.
        qweight: `[V, ceil(K / 8) · bits]` uint8, see `packing`.
        scale: `[V, L]`, float32 or float64.
        offset: `[V, L]`, as `scale`.
        dtype: Of the result; W is computed in that of `scale`.
        bits: Width of a code.
        group_size: g; L = ceil(K / g).
        k: K.
    """
    parts = (t[ids.flatten()] for t in (qweight, scale, offset))
    rows = dequantize(*parts, bits=bits, group_size=group_size, k=k)
    return rows.reshape(*ids.shape, k).to(dtype).contiguous()


@group_embedding.register_fake
def _group_embedding_fake(
    ids: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    return scale.new_empty(*ids.shape, k, dtype=dtype)


@view_of(group_embedding)
@dataclass(frozen=True)
class GroupEmbedding(OperatorView):
    """A node of `group_embedding`."""

    ids: fx.Node
    qweight: fx.Node
    scale: fx.Node
    offset: fx.Node
    dtype: torch.dtype
    bits: int
    group_size: int
    k: int


@torch.library.custom_op(f"{NAMESPACE}::block_embedding", mutates_args=())
def block_embedding(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    block_size: int,
    k: int,
) -> Tensor:
    """Rows `ids` of `W = scale · (q − zero_point)`, `[.., K]` float32.

    Args:
        ids: `[..]` integers, 0 to V − 1.
        codes: `[V, L, block_size · bits / 8]` uint8, low bits first.
        scale: `[V, L]`, float32 or float16.
        zero_point: `[V, L]`, as `scale` (GroupQuantLinear), or integers packed like the codes,
            `[V, ceil(L · bits / 8)]` uint8 (MatMulNBits).
        bits: 4 or 8.
        block_size: A multiple of 16.
        k: K.
    """
    codes, scale, zero_point = (t[ids.flatten()] for t in (codes, scale, zero_point))
    weight = matmul_nbits_weight if zero_point.dtype == torch.uint8 else group_quant_weight
    rows = weight(codes, scale, zero_point, bits, block_size, k)
    return rows.reshape(*ids.shape, k).contiguous()


@block_embedding.register_fake
def _block_embedding_fake(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    block_size: int,
    k: int,
) -> Tensor:
    return scale.new_empty(*ids.shape, k, dtype=torch.float32)


@view_of(block_embedding)
@dataclass(frozen=True)
class BlockEmbedding(OperatorView):
    """A node of `block_embedding`."""

    ids: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    bits: int
    block_size: int
    k: int


@torch.library.custom_op(f"{NAMESPACE}::flat_embedding", mutates_args=())
def flat_embedding(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    block_size: int,
    k: int,
) -> Tensor:
    """Columns `ids` of W `[K, V]` of ONNX's DequantizeLinear, transposed to rows: `[.., K]`.

    Args:
        ids: `[..]` integers, 0 to V − 1.
        codes: As for `matmul_blocks`, `[ceil(K · V · bits / 8)]` uint8.
        scale: `[Lb, V]` float32.
        zero_point: The `[Lb, V]` integer zero-points, stored as the codes.
        bits: 4 or 8.
        block_size: Rows of W that share a scale.
        k: K.
    """
    weight = blocks_weight(codes, scale, zero_point, bits, block_size, k)
    return weight[:, ids.flatten()].t().reshape(*ids.shape, k).contiguous()


@flat_embedding.register_fake
def _flat_embedding_fake(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    block_size: int,
    k: int,
) -> Tensor:
    return scale.new_empty(*ids.shape, k)


@view_of(flat_embedding)
@dataclass(frozen=True)
class FlatEmbedding(OperatorView):
    """A node of `flat_embedding`."""

    ids: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    bits: int
    block_size: int
    k: int

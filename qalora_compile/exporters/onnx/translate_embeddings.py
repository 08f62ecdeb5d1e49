"""Translations of quantized embeddings: standard operators, on the tensors that the head reads.

Complete rows of codes are gathered and then unpacked, so that the cost of a lookup is proportional
to its rows. Computations on weights alone are left to the runtime's constant folding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qalora_compile.exporters.onnx.operators import unpack_blocks_op

Table = dict[Callable[..., Any], Callable[..., Any]]
_FLOAT, _UINT8 = 1, 2  # of ONNX's TensorProto.DataType


def embedding_table(op: Any, newest: Any) -> Table:
    """Operator → function that emits its ONNX nodes.

    Args:
        op: Operators of opset 18.
        newest: Operators of opset 21, for target `onnx`.
    """
    ops = torch.ops.qalora
    return {
        ops.block_embedding.default: _block_emitter(op),
        ops.flat_embedding.default: _flat_emitter(op, newest),
    }


def _block_emitter(op: Any) -> Callable[..., Any]:
    def emit(
        ids: Any, codes: Any, scale: Any, zero_point: Any, bits: int, block_size: int, k: int
    ) -> Any:
        blocks, rank = int(codes.shape[1]), len(ids.shape)
        lead = [0] * rank  # Reshape copies these
        rows = _unpack(op, op.Gather(codes, ids), bits)
        rows = op.Reshape(rows, op.Constant(value_ints=[*lead, blocks, block_size]))
        zero = op.Gather(zero_point, ids)
        if zero_point.dtype == _UINT8:
            zero = _unpack(op, zero, bits)
            zero = op.Reshape(zero, op.Constant(value_ints=[*lead, -1]))
            zero = _first(op, zero, blocks)
        last = op.Constant(value_ints=[-1])
        level = op.Sub(op.Cast(rows, to=_FLOAT), op.Unsqueeze(op.Cast(zero, to=_FLOAT), last))
        step = op.Cast(op.Gather(scale, ids), to=_FLOAT)
        found = op.Mul(level, op.Unsqueeze(step, last))
        found = op.Reshape(found, op.Constant(value_ints=[*lead, blocks * block_size]))
        return found if blocks * block_size == k else _first(op, found, k)

    return emit


def _flat_emitter(op: Any, newest: Any) -> Callable[..., Any]:
    unpack_blocks = unpack_blocks_op()

    def emit(
        ids: Any, codes: Any, scale: Any, zero_point: Any, bits: int, block_size: int, k: int
    ) -> Any:
        # ONNX Runtime fuses no layer that shares its scales; transposed, they are another tensor.
        sizes = {"N": int(scale.shape[1]), "bits": bits}
        rows, zero, step = (
            op.Gather(op.Transpose(table, perm=[1, 0]), ids)
            for table in (
                unpack_blocks(codes, K=k, **sizes),
                unpack_blocks(zero_point, K=int(scale.shape[0]), **sizes),
                scale,
            )
        )
        return newest.DequantizeLinear(rows, step, zero, axis=-1, block_size=block_size)

    return emit


def _unpack(op: Any, rows: Any, bits: int) -> Any:
    """Bytes `[..]` as codes `[.., 8 / bits]`, low bits first."""
    if bits == 8:
        return rows
    shifts = op.Cast(op.Constant(value_ints=list(range(0, 8, bits))), to=_UINT8)
    mask = op.Cast(op.Constant(value_ints=[2**bits - 1]), to=_UINT8)
    each = op.Unsqueeze(rows, op.Constant(value_ints=[-1]))
    return op.BitwiseAnd(op.BitShift(each, shifts, direction="RIGHT"), mask)


def _first(op: Any, x: Any, size: int) -> Any:
    """The first `size` values along the last axis."""
    zero, last, stop = (op.Constant(value_ints=[v]) for v in (0, -1, size))
    return op.Slice(x, zero, stop, last)

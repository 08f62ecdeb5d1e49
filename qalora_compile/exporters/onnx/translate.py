"""Translations of this package's operators to ONNX, for torch.onnx's exporter.

There is no arithmetic on weights here: passes have brought them into their final form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.onnx.operators import (
    dequantize_blocks_op,
    group_quant_linear_op,
    matmul_nbits_op,
)
from qalora_compile.exporters.onnx.translate_aten import aten_table
from qalora_compile.exporters.onnx.translate_contrib import contrib_table
from qalora_compile.exporters.onnx.translate_embeddings import embedding_table
from qalora_compile.exporters.onnx.translate_experts import expert_table
from qalora_compile.exporters.onnx.translate_fused import fused_table
from qalora_compile.ir.packing.kernel_layouts import largest_block, stored_bits
from qalora_compile.optional import require

Table = dict[Callable[..., Any], Callable[..., Any]]


def translation_table(spec: ExportSpec, *, bias: bool = True) -> Table:
    """Operator → function that emits its ONNX nodes, for `custom_translation_table`.

    Args:
        spec: Target, opset and fusion.
        bias: Whether the runtime's MatMulNBits takes a bias; else it is added to the product.
    """
    opset, fusion = spec.onnx_opset, spec.fusion
    onnxscript = require("onnxscript", extra="onnx", purpose="export to ONNX")
    op = onnxscript.opset18
    kernels = _kernel_table(op, bias_inside=bias)
    table = kernels | aten_table(op) | _plain_table(op) | expert_table(op, kernels)
    table |= embedding_table(op, onnxscript.opset21)
    if opset >= 23:
        table |= fused_table(onnxscript.opset23, library=spec.target == "ort")
    return table | contrib_table(op) if fusion == "ort" else table


def _kernel_table(op: Any, *, bias_inside: bool) -> Table:
    """The quantized layers of each target."""
    matmul_nbits, group_quant_linear = matmul_nbits_op(), group_quant_linear_op()

    def emit_matmul_nbits(
        x: Any,
        qweight: Any,
        scale: Any,
        zero_point: Any,
        bias: Any,
        bits: int,
        block_size: int,
        accuracy_level: int,
        k: int | None = None,
    ) -> Any:
        attributes = {"K": k or int(x.shape[-1]), "N": int(qweight.shape[0])}
        attributes |= {"bits": bits, "block_size": block_size}
        if accuracy_level:
            attributes["accuracy_level"] = accuracy_level
        inputs = [x, qweight, scale, zero_point]
        if bias is None or not bias_inside:
            product = matmul_nbits(*inputs, **attributes)
            return product if bias is None else op.Add(product, bias)
        return matmul_nbits(*inputs, None, bias, **attributes)

    def emit_group_quant_linear(
        x: Any,
        codes: Any,
        scale: Any,
        zero_point: Any,
        bits: int,
        group_size: int,
        compute: str,
        k: int | None = None,
    ) -> Any:
        # The rows of one expert are a matrix whose shape is not stated: k is given.
        lead, columns = ([0], k) if k else (_kept_axes(x), int(x.shape[-1]))
        return group_quant_linear(
            x,
            codes,
            scale,
            zero_point,
            K=columns,
            N=int(codes.shape[0]),
            bits=bits,
            group_size=group_size,
            compute=compute,
            stock_bits=stored_bits(bits, narrow=compute == "int8"),
            stock_block_size=largest_block(group_size),
            stock_accuracy_level=4 if compute == "int8" else 0,
            stock_middle=float(2 ** (bits - 1)),
            stock_groups=[*lead, columns // group_size, group_size],
        )

    ops = torch.ops.qalora
    return {
        ops.matmul_nbits.default: emit_matmul_nbits,
        ops.group_quant_linear.default: emit_group_quant_linear,
        ops.matmul_blocks.default: _matmul_blocks_emitter(op),
    }


def _matmul_blocks_emitter(op: Any) -> Callable[..., Any]:
    dequantize_blocks = dequantize_blocks_op()

    def emit_matmul_blocks(
        x: Any,
        codes: Any,
        scale: Any,
        zero_point: Any,
        bits: int,
        block_size: int,
        k: int | None = None,
    ) -> Any:
        sizes = {"K": k or int(x.shape[-1]), "N": int(scale.shape[1])}
        weight = dequantize_blocks(
            codes, scale, zero_point, bits=bits, block_size=block_size, **sizes
        )
        return op.MatMul(x, weight)

    return emit_matmul_blocks


def _plain_table(op: Any) -> Table:
    """The other operators, in standard operators of ONNX."""

    def emit_group_sum(x: Any, group_size: int) -> Any:
        k = int(x.shape[-1])
        groups = -(-k // group_size)
        padded = _pad_last(op, x, groups * group_size - k)
        shape = op.Constant(value_ints=[*_kept_axes(x), groups, group_size])
        return op.ReduceSum(op.Reshape(padded, shape), op.Constant(value_ints=[-1]), keepdims=0)

    def emit_pad_groups(x: Any, group_size: int, width: int) -> Any:
        k = int(x.shape[-1])
        groups = -(-k // group_size)
        padded = _pad_last(op, x, groups * group_size - k)
        if width == group_size:
            return padded
        axes = _kept_axes(x)
        split = op.Reshape(padded, op.Constant(value_ints=[*axes, groups, group_size]))
        pads = op.Constant(value_ints=[0] * (2 * len(axes) + 3) + [width - group_size])
        return op.Reshape(op.Pad(split, pads), op.Constant(value_ints=[*axes, groups * width]))

    def emit_pooled_adapter(pooled: Any, lora_a: Any, lora_b: Any, scaling: float) -> Any:
        hidden = op.MatMul(pooled, op.Transpose(lora_a, perm=[1, 0]))
        update = op.MatMul(hidden, op.Transpose(lora_b, perm=[1, 0]))
        return op.Mul(update, op.Constant(value_float=scaling))

    ops = torch.ops.qalora
    return {
        ops.group_sum.default: emit_group_sum,
        ops.pad_groups.default: emit_pad_groups,
        ops.pooled_adapter.default: emit_pooled_adapter,
    }


def _kept_axes(x: Any) -> list[int]:
    """The leading axes for Reshape, where 0 copies a dimension of any size."""
    return [0] * (len(x.shape) - 1)


def _pad_last(op: Any, x: Any, amount: int) -> Any:
    """Zero-pad the last axis at its end."""
    if amount == 0:
        return x
    rank = len(x.shape)
    return op.Pad(x, op.Constant(value_ints=[0] * (2 * rank - 1) + [amount]))

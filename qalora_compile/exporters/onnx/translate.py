"""Translations of this package's operators to ONNX, for torch.onnx's exporter.

No arithmetic on weights happens here: passes have brought them into their final form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qalora_compile.exporters.onnx.translate_experts import expert_table
from qalora_compile.optional import require

MICROSOFT = "com.microsoft"


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → function that emits its ONNX nodes, for `custom_translation_table`."""
    onnxscript = require("onnxscript", extra="onnx", purpose="export to ONNX")
    op = onnxscript.opset18
    matmul_nbits = _matmul_nbits_op(onnxscript)

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
        n, blocks, _ = (int(d) for d in qweight.shape)
        k = int(x.shape[-1]) if k is None else k
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size}
        if accuracy_level:
            attributes["accuracy_level"] = accuracy_level
        inputs = [x, qweight, scale, zero_point] + ([] if bias is None else [None, bias])
        return matmul_nbits(*inputs, **attributes)

    def emit_group_sum(x: Any, group_size: int) -> Any:
        k = int(x.shape[-1])
        groups = -(-k // group_size)
        padded = _pad_last(op, x, groups * group_size - k)
        shape = op.Constant(value_ints=[*_kept_axes(x), groups, group_size])
        return op.ReduceSum(op.Reshape(padded, shape), op.Constant(value_ints=[-1]), keepdims=0)

    def emit_spread_groups(x: Any, group_size: int, width: int) -> Any:
        k = int(x.shape[-1])
        groups = -(-k // group_size)
        padded = _pad_last(op, x, groups * group_size - k)
        axes = _kept_axes(x)
        split = op.Reshape(padded, op.Constant(value_ints=[*axes, groups, group_size]))
        pads = op.Constant(value_ints=[0] * (2 * len(axes) + 3) + [width - group_size])
        return op.Reshape(op.Pad(split, pads), op.Constant(value_ints=[*axes, groups * width]))

    def emit_pooled_adapter(pooled: Any, lora_a: Any, lora_b: Any, scaling: float) -> Any:
        hidden = op.MatMul(pooled, op.Transpose(lora_a, perm=[1, 0]))
        update = op.MatMul(hidden, op.Transpose(lora_b, perm=[1, 0]))
        return op.Mul(update, op.Constant(value_float=scaling))

    ops = torch.ops.qalora
    return expert_table(op, emit_matmul_nbits) | {
        ops.matmul_nbits.default: emit_matmul_nbits,
        ops.group_sum.default: emit_group_sum,
        ops.spread_groups.default: emit_spread_groups,
        ops.pooled_adapter.default: emit_pooled_adapter,
    }


def _kept_axes(x: Any) -> list[int]:
    """Leading axes for Reshape: 0 copies a dimension, whatever its size at run time."""
    return [0] * (len(x.shape) - 1)


def _pad_last(op: Any, x: Any, amount: int) -> Any:
    """Zero-pad the last axis at its end."""
    if amount == 0:
        return x
    rank = len(x.shape)
    return op.Pad(x, op.Constant(value_ints=[0] * (2 * rank - 1) + [amount]))


def _matmul_nbits_op(onnxscript: Any) -> Any:
    """`com.microsoft::MatMulNBits` as a callable operator; onnx itself has no schema for it."""
    defs = require("onnx", extra="onnx", purpose="export to ONNX").defs
    schema_type, option = defs.OpSchema, defs.OpSchema.FormalParameterOption
    parameter = schema_type.FormalParameter
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    schema = schema_type(
        "MatMulNBits",
        MICROSOFT,
        1,
        inputs=[
            parameter("A", "T1"),
            parameter("B", "T2"),
            parameter("scales", "T1"),
            parameter("zero_points", "T3", param_option=option.Optional),
            parameter("g_idx", "T4", param_option=option.Optional),
            parameter("bias", "T1", param_option=option.Optional),
        ],
        outputs=[parameter("Y", "T1")],
        type_constraints=[
            ("T1", floats, ""),
            ("T2", ["tensor(uint8)"], ""),
            ("T3", ["tensor(uint8)", *floats], ""),
            ("T4", ["tensor(int32)"], ""),
        ],
        attributes=[
            schema_type.Attribute(name, schema_type.AttrType.INT, "", required=required)
            for name, required in (
                ("K", True),
                ("N", True),
                ("bits", True),
                ("block_size", True),
                ("accuracy_level", False),
            )
        ],
    )
    domain = onnxscript.values.Opset(MICROSOFT, 1)
    return onnxscript.values.Op(domain, "MatMulNBits", schema)

"""Translations of fused operators to those of ONNX Runtime's domain `com.microsoft`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qalora_compile.exporters.onnx.operators import multi_head_op, rotary_op, skip_norm_op


def contrib_table(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → function that emits its ONNX nodes; `op` is opset 18."""
    ops = torch.ops.qalora
    return {
        **_norm_table(op),
        **_attention_table(op),
        ops.rotary_embedding.default: _rotary_emitter(op),
    }


def _norm_table(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    skip_norm = skip_norm_op()

    def emit_rms_norm(x: Any, weight: Any, eps: float) -> Any:
        # ONNX Runtime has this operator in the standard domain, though the standard does not.
        square = op.Pow(x, op.Constant(value_float=2.0))
        mean = op.ReduceMean(square, op.Constant(value_ints=[-1]), keepdims=1)
        root = op.Sqrt(op.Add(mean, op.Constant(value_float=eps)))
        return op.Mul(op.Div(x, root), weight)

    def emit_skip_rms_norm(x: Any, skip: Any, weight: Any, eps: float) -> Any:
        results = skip_norm(x, skip, weight, epsilon=eps)
        return results[0], results[3]

    ops = torch.ops.qalora
    return {ops.rms_norm.default: emit_rms_norm, ops.skip_rms_norm.default: emit_skip_rms_norm}


def _rotary_emitter(op: Any) -> Callable[..., Any]:
    rotary = rotary_op()

    def emit_rotary_embedding(x: Any, cos: Any, sin: Any, heads: int) -> Any:
        """Give each token its own row of angles, since the operator looks them up by position."""
        each, half = int(x.shape[-1]) // heads, int(cos.shape[-1])
        row = op.Constant(value_ints=[-1, half])
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        sizes = op.Shape(cos, start=0, end=2)
        count = op.ReduceProd(sizes, keepdims=0)
        numbers = op.Reshape(op.Range(zero, count, one), sizes)
        if cos.shape[0] == 1:  # the same for each sequence of a batch
            numbers = op.Expand(numbers, op.Shape(x, start=0, end=2))
        part = {} if 2 * half == each else {"rotary_embedding_dim": 2 * half}
        tables = op.Reshape(cos, row), op.Reshape(sin, row)
        return rotary(x, numbers, *tables, num_heads=heads, **part)

    return emit_rotary_embedding


def _attention_table(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    alone, with_past = multi_head_op(1), multi_head_op(3)

    def emit_multi_head_attention(
        q: Any,
        k: Any,
        v: Any,
        bias: Any,
        past_key: Any,
        past_value: Any,
        heads: int,
        scale: float,
    ) -> Any:
        options = {"num_heads": heads, "scale": scale}
        if past_key is None:
            # Without a past, nothing reads keys and values, but torch.onnx needs all three outputs.
            y = alone(q, k, v, None, None, bias, **options)
            return y, op.Identity(k), op.Identity(v)
        return with_past(q, k, v, None, None, bias, past_key, past_value, **options)

    def emit_join_groups(q: Any, heads: int, kv_heads: int) -> Any:
        groups, width = heads // kv_heads, int(q.shape[2]) // heads
        each = op.Reshape(q, op.Constant(value_ints=[0, 0, kv_heads, groups, width]))
        permuted = op.Transpose(each, perm=[0, 3, 1, 2, 4])
        return op.Reshape(permuted, op.Constant(value_ints=[0, -1, kv_heads * width]))

    def emit_split_groups(y: Any, heads: int, kv_heads: int) -> Any:
        groups, width = heads // kv_heads, int(y.shape[2]) // kv_heads
        each = op.Reshape(y, op.Constant(value_ints=[0, groups, -1, kv_heads, width]))
        permuted = op.Transpose(each, perm=[0, 2, 3, 1, 4])
        return op.Reshape(permuted, op.Constant(value_ints=[0, 0, heads * width]))

    ops = torch.ops.qalora
    return {
        ops.multi_head_attention.default: emit_multi_head_attention,
        ops.join_groups.default: emit_join_groups,
        ops.split_groups.default: emit_split_groups,
    }

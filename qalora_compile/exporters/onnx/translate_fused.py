"""Translations of fused operators to their ONNX counterparts, which exist since opset 23."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def fused_table(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → function that emits its ONNX node; `op` is opset 23."""

    def emit_rms_norm(x: Any, weight: Any, eps: float) -> Any:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)

    def emit_rotary_embedding(x: Any, cos: Any, sin: Any, heads: int) -> Any:
        each = int(x.shape[-1]) // heads
        rotated = 2 * int(cos.shape[-1])
        part = {} if rotated == each else {"rotary_embedding_dim": rotated}
        if cos.shape[0] == 1:  # shared by a batch, and the operator does not broadcast
            half = op.Constant(value_ints=[rotated // 2])
            sizes = op.Concat(op.Shape(x, start=0, end=2), half, axis=0)
            cos, sin = op.Expand(cos, sizes), op.Expand(sin, sizes)
        return op.RotaryEmbedding(x, cos, sin, num_heads=heads, **part)

    def emit_attention(
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        past_key: Any,
        past_value: Any,
        heads: int,
        kv_heads: int,
        scale: float,
    ) -> Any:
        inputs = [q, k, v, mask, past_key, past_value]
        sizes = {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": scale}
        return op.Attention(*inputs, **sizes)[:3]

    ops = torch.ops.qalora
    return {
        ops.rms_norm.default: emit_rms_norm,
        ops.rotary_embedding.default: emit_rotary_embedding,
        ops.attention.default: emit_attention,
    }

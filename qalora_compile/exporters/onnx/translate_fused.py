"""Translations of fused operators to their ONNX counterparts, which exist since opset 23."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qalora_compile.exporters.onnx.operators import cached_attention_op
from qalora_compile.optional import require


def fused_table(op: Any, *, library: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → function that emits its ONNX node.

    Args:
        op: Opset 23.
        library: Emit the operators of the operator library where they apply.
    """
    cached_attention = cached_attention_op()

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
        if library and _extends_a_cache(q, mask, past_key):
            return cached_attention(*inputs, **sizes)
        return op.Attention(*inputs, **sizes)[:3]

    ops = torch.ops.qalora
    return {
        ops.rms_norm.default: emit_rms_norm,
        ops.rotary_embedding.default: emit_rotary_embedding,
        ops.attention.default: emit_attention,
    }


def _extends_a_cache(q: Any, mask: Any, past_key: Any) -> bool:
    """Whether CachedAttention takes a call: float32, with a past and a mask of all four axes."""
    types = require("onnx_ir", extra="onnx", purpose="export to ONNX").DataType
    if mask is None or past_key is None or mask.shape is None or q.dtype != types.FLOAT:
        return False
    masks = mask.dtype in (types.BOOL, types.FLOAT)
    return masks and len(mask.shape) == 4 and bool(mask.shape[2] == q.shape[1])

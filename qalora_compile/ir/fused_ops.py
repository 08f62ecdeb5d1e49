"""Operators that stand for whole patterns of a transformer, registered as `torch.ops.qalora.*`.

======================  ==========================================================================
`rms_norm`              ONNX RMSNormalization (opset 23)
`rotary_embedding`      ONNX RotaryEmbedding (opset 23), halves rotated against each other
`attention`             ONNX Attention (opset 23): grouped heads, mask, key-value cache
======================  ==========================================================================

Each has a plain-torch reference and a fake kernel, and no gradient: fusions run before export.
Activations have their heads side by side, `[B, S, H · D]`, as a linear layer gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.ir.ops import NAMESPACE


@torch.library.custom_op(f"{NAMESPACE}::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / √(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467, Eq. 4).

    Args:
        x: `[.., N]`.
        weight: `[N]`.
        eps: Added to the mean.
    """
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@rms_norm.register_fake
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate the first R values of each head by position (arXiv 2104.09864, Eq. 34).

    Value i of the first half of R turns with value i of the second; the rest of a head stays.

    Args:
        x: `[B, S, H · D]`.
        cos: `[B, S, R / 2]`.
        sin: As `cos`.
        heads: H.
    """
    half = cos.shape[-1]
    each = x.unflatten(-1, (heads, -1))
    first, second, rest = each.tensor_split((half, 2 * half), dim=-1)
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)
    return turned.flatten(-2)


@rotary_embedding.register_fake
def _rotary_embedding_fake(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale · Q Kᵀ + mask) V for each head, on the keys and values of the past and of now.

    Args:
        q: `[B, S, H · D]`.
        k: `[B, S, Hk · D]`; H is a multiple of Hk, and so many heads of q share one of k and v.
        v: `[B, S, Hk · Dv]`.
        mask: `[B or 1, H or 1, S, T]` boolean (true takes part) or float (added); None masks none.
        past_key: `[B, Hk, P, D]`, T = P + S; or None.
        past_value: `[B, Hk, P, Dv]`; or None.
        heads: H.
        kv_heads: Hk.
        scale: Of the products.

    Returns:
        `[B, S, H · Dv]`, and all keys and values, `[B, Hk, T, D]` and `[B, Hk, T, Dv]`.
    """
    queries, keys, values = (
        t.unflatten(-1, (n, -1)).transpose(1, 2)
        for t, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    if past_key is not None and past_value is not None:
        keys, values = torch.cat([past_key, keys], 2), torch.cat([past_value, values], 2)
    all_k, all_v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (keys, values))
    y = functional.scaled_dot_product_attention(queries, all_k, all_v, mask, scale=scale)
    kept = (t.clone(memory_format=torch.contiguous_format) for t in (keys, values))
    return y.transpose(1, 2).flatten(-2), *kept


@attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = k.shape[:2]
    width, value_width = k.shape[2] // kv_heads, v.shape[2] // kv_heads
    total = length if past_key is None else past_key.shape[2] + length
    return (
        q.new_empty(*q.shape[:2], heads * value_width),
        k.new_empty(batch, kv_heads, total, width),
        v.new_empty(batch, kv_heads, total, value_width),
    )

"""Operators that fuse patterns of a transformer, registered as `torch.ops.qalora.*`.

======================  ==========================================================================
`rms_norm`              ONNX RMSNormalization (opset 23)
`rotary_embedding`      ONNX RotaryEmbedding (opset 23), halves rotated against each other
`attention`             ONNX Attention (opset 23): grouped heads, mask, key-value cache
`skip_rms_norm`         com.microsoft SkipSimplifiedLayerNormalization: a sum and its norm
`multi_head_attention`  com.microsoft MultiHeadAttention: each head its own keys and values
`join_groups`           com.microsoft has no attention of grouped heads that takes any call: their
`split_groups`          queries become rows of the head whose keys they share, and are taken apart
======================  ==========================================================================

Each has a plain-torch reference and a fake kernel, and no gradient: fusions run before export.
Activations are `[B, S, H · D]`, the heads next to each other, as a linear layer gives them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.ir.ops.linear import NAMESPACE
from qalora_compile.ir.ops.views import OperatorView, view_of


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


@view_of(rms_norm)
@dataclass(frozen=True)
class RmsNorm(OperatorView):
    """A node of `rms_norm`."""

    x: fx.Node
    weight: fx.Node
    eps: float


@torch.library.custom_op(f"{NAMESPACE}::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate the first R values of each head by position (arXiv 2104.09864, Eq. 34).

    Value i of the first half of R is rotated with value i of the second; the rest of a head stays.

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
    rotated = torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)
    return rotated.flatten(-2)


@rotary_embedding.register_fake
def _rotary_embedding_fake(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


@view_of(rotary_embedding)
@dataclass(frozen=True)
class RotaryEmbedding(OperatorView):
    """A node of `rotary_embedding`."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    heads: int


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
        k: `[B, S, Hk · D]`; H is a multiple of Hk, and H / Hk heads of q share a head of k and v.
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


@view_of(attention)
@dataclass(frozen=True)
class Attention(OperatorView):
    """A node of `attention`."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    past_key: fx.Node | None
    past_value: fx.Node | None
    heads: int
    kv_heads: int
    scale: float


@torch.library.custom_op(f"{NAMESPACE}::skip_rms_norm", mutates_args=())
def skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The `rms_norm` of x + skip, and x + skip.

    Args:
        x: `[B, S, N]`.
        skip: As `x`.
        weight: `[N]`.
        eps: Added to the mean.
    """
    total = x + skip
    return rms_norm(total, weight, eps), total


@skip_rms_norm.register_fake
def _skip_rms_norm_fake(
    x: Tensor, skip: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@view_of(skip_rms_norm)
@dataclass(frozen=True)
class SkipRmsNorm(OperatorView):
    """A node of `skip_rms_norm`."""

    x: fx.Node
    skip: fx.Node
    weight: fx.Node
    eps: float


@torch.library.custom_op(f"{NAMESPACE}::multi_head_attention", mutates_args=())
def multi_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` in which every head has its own keys and values.

    Args:
        q: `[B, R, H · D]`; R, the number of queries, need not be S.
        k: `[B, S, H · D]`.
        v: `[B, S, H · Dv]`.
        bias: `[B or 1, H or 1, R, T]`, added to the products; None adds nothing.
        past_key: `[B, H, P, D]`, T = P + S; or None.
        past_value: `[B, H, P, Dv]`; or None.
        heads: H.
        scale: Of the products.

    Returns:
        `[B, R, H · Dv]`, and all keys and values, `[B, H, T, D]` and `[B, H, T, Dv]`.
    """
    found: tuple[Tensor, Tensor, Tensor] = attention(
        q, k, v, bias, past_key, past_value, heads, heads, scale
    )
    return found


@multi_head_attention.register_fake
def _multi_head_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes: tuple[Tensor, Tensor, Tensor] = _attention_fake(
        q, k, v, bias, past_key, past_value, heads, heads, scale
    )
    return shapes


@view_of(multi_head_attention)
@dataclass(frozen=True)
class MultiHeadAttention(OperatorView):
    """A node of `multi_head_attention`."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    bias: fx.Node | None
    past_key: fx.Node | None
    past_value: fx.Node | None
    heads: int
    scale: float


@torch.library.custom_op(f"{NAMESPACE}::join_groups", mutates_args=())
def join_groups(q: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The queries of heads that share keys, as rows of one head: for each of the G heads, all S.

    Args:
        q: `[B, S, H · D]`, head `i · G + j` with the keys `i`.
        heads: H.
        kv_heads: Hk, H = Hk · G.

    Returns:
        `[B, G · S, Hk · D]`.
    """
    each = q.unflatten(2, (kv_heads, heads // kv_heads, -1))
    permuted = each.permute(0, 3, 1, 2, 4).clone(memory_format=torch.contiguous_format)
    joined: Tensor = permuted.flatten(3).flatten(1, 2)
    return joined


@join_groups.register_fake
def _join_groups_fake(q: Tensor, heads: int, kv_heads: int) -> Tensor:
    groups = heads // kv_heads
    return q.new_empty(q.shape[0], groups * q.shape[1], q.shape[2] // groups)


@view_of(join_groups)
@dataclass(frozen=True)
class JoinGroups(OperatorView):
    """A node of `join_groups`."""

    q: fx.Node
    heads: int
    kv_heads: int


@torch.library.custom_op(f"{NAMESPACE}::split_groups", mutates_args=())
def split_groups(y: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Undo `join_groups`: `[B, G · S, Hk · D]` to `[B, S, H · D]`."""
    each = y.unflatten(1, (heads // kv_heads, -1)).unflatten(3, (kv_heads, -1))
    permuted = each.permute(0, 2, 3, 1, 4).clone(memory_format=torch.contiguous_format)
    split: Tensor = permuted.flatten(2)
    return split


@split_groups.register_fake
def _split_groups_fake(y: Tensor, heads: int, kv_heads: int) -> Tensor:
    groups = heads // kv_heads
    return y.new_empty(y.shape[0], y.shape[1] // groups, y.shape[2] * groups)


@view_of(split_groups)
@dataclass(frozen=True)
class SplitGroups(OperatorView):
    """A node of `split_groups`."""

    y: fx.Node
    heads: int
    kv_heads: int

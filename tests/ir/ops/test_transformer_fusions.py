"""Fused operators against their formulas in float64, and their fake kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.ir.spec import (
    ATTENTION,
    JOIN_GROUPS,
    MULTI_HEAD_ATTENTION,
    RMS_NORM,
    ROTARY_EMBEDDING,
    SKIP_RMS_NORM,
    SPLIT_GROUPS,
)

CHECKS = ("test_schema", "test_faketensor")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_rms_norm_is_its_formula() -> None:
    x, weight = random(2, 3, 8), random(8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(RMS_NORM(x, weight, 1e-5), expected)
    torch.library.opcheck(RMS_NORM, (x, weight, 1e-5), test_utils=CHECKS)


@given(heads=st.integers(1, 4), half=st.integers(1, 4), rest=st.integers(0, 3))
def test_rotary_embedding_turns_pairs_and_keeps_the_rest(heads: int, half: int, rest: int) -> None:
    x = random(2, 3, heads * (2 * half + rest))
    angle = random(2, 3, half)
    found = ROTARY_EMBEDDING(x, angle.cos(), angle.sin(), heads).unflatten(-1, (heads, -1))
    each = x.unflatten(-1, (heads, -1))
    pairs = torch.complex(each[..., :half], each[..., half : 2 * half])
    rotated = pairs * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    torch.testing.assert_close(found[..., :half], rotated.real)
    torch.testing.assert_close(found[..., half : 2 * half], rotated.imag)
    assert torch.equal(found[..., 2 * half :], each[..., 2 * half :])


def test_rotary_embedding_has_a_fake_kernel() -> None:
    args = (random(2, 3, 16), random(2, 3, 4), random(2, 3, 4), 2)
    torch.library.opcheck(ROTARY_EMBEDDING, args, test_utils=CHECKS)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [1, 3])
def test_attention_is_its_formula(past: int, masked: bool, shared: int) -> None:
    heads, kv_heads, length, width = 2 * shared, 2, 4, 8
    q, k, v = random(2, length, heads * width), random(2, length, 16), random(2, length, 12)
    old = (random(2, kv_heads, past, width), random(2, kv_heads, past, 6)) if past else (None, None)
    mask = torch.rand(2, 1, length, past + length) > 0.3
    mask[..., 0] = True
    y, keys, values = ATTENTION(q, k, v, mask if masked else None, *old, heads, kv_heads, 0.3)
    assert keys.shape == (2, kv_heads, past + length, width)
    assert values.shape == (2, kv_heads, past + length, 6)
    for head in range(heads):
        rows = q.unflatten(-1, (heads, width))[:, :, head]
        score = 0.3 * rows @ keys[:, head // shared].mT
        if masked:
            score = score.masked_fill(~mask[:, 0], float("-inf"))
        expected = score.softmax(-1) @ values[:, head // shared]
        torch.testing.assert_close(y.unflatten(-1, (heads, 6))[:, :, head], expected)
    args = (q, k, v, mask if masked else None, *old, heads, kv_heads, 0.3)
    torch.library.opcheck(ATTENTION, args, test_utils=CHECKS)


def test_skip_rms_norm_is_the_norm_of_a_sum() -> None:
    x, skip, weight = random(2, 3, 8), random(2, 3, 8), random(8)
    y, total = SKIP_RMS_NORM(x, skip, weight, 1e-5)
    assert torch.equal(total, x + skip)
    mean = (x + skip).square().mean(-1, keepdim=True)
    torch.testing.assert_close(y, (x + skip) / (mean + 1e-5).sqrt() * weight)
    torch.library.opcheck(SKIP_RMS_NORM, (x, skip, weight, 1e-5), test_utils=CHECKS)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_joined_groups_attend_as_they_did(length: int, kv_heads: int) -> None:
    heads, width, past = 6, 4, 3
    q, k = random(2, length, heads * width), random(2, length, kv_heads * width)
    v, total = random(2, length, kv_heads * width), past + length
    old = random(2, kv_heads, past, width), random(2, kv_heads, past, width)
    mask = torch.rand(2, 1, length, total) > 0.3
    mask[..., 0] = True
    expected = ATTENTION(q, k, v, mask, *old, heads, kv_heads, 0.3)
    joined = JOIN_GROUPS(q, heads, kv_heads)
    assert joined.shape == (2, heads // kv_heads * length, kv_heads * width)
    bias = torch.where(mask, 0.0, -1e30).double().repeat(1, 1, heads // kv_heads, 1)
    args = (joined, k, v, bias, *old, kv_heads, 0.3)
    y, *cache = MULTI_HEAD_ATTENTION(*args)
    found = (SPLIT_GROUPS(y, heads, kv_heads), *cache)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.library.opcheck(MULTI_HEAD_ATTENTION, args, test_utils=CHECKS)
    torch.library.opcheck(JOIN_GROUPS, (q, heads, kv_heads), test_utils=CHECKS)
    torch.library.opcheck(SPLIT_GROUPS, (y, heads, kv_heads), test_utils=CHECKS)


def test_joined_groups_are_split_again() -> None:
    q = random(2, 5, 24)
    assert torch.equal(SPLIT_GROUPS(JOIN_GROUPS(q, 6, 2), 6, 2), q)
    assert torch.equal(JOIN_GROUPS(q, 6, 2)[:, :5, :4], q[:, :, :4])  # head 0, with the keys 0
    assert torch.equal(JOIN_GROUPS(q, 6, 2)[:, 5:10, 4:], q[:, :, 16:20])  # head 4, with 1

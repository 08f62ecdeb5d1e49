"""`AdaptedWeight` and `AdaptedLinear` against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from qalora_compile.eager.layers import PARTS, AdaptedLinear, AdaptedWeight, register_parts
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.packing.bitstream import pack_codes


def make_parts(
    n: int, k: int, bits: int, group: int, pool: int, rank: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of one adapted weight in float64, and its matrix written out."""
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale, offset = (torch.randn(n, group_count(k, group), dtype=torch.float64) for _ in range(2))
    lora_a = torch.randn(rank, group_count(k, pool), dtype=torch.float64)
    lora_b = torch.randn(n, rank, dtype=torch.float64)
    column = torch.arange(k)
    base = scale[:, column // group] * codes + offset[:, column // group]
    matrix = base + 0.5 * (lora_b @ lora_a)[:, column // pool]
    parts = dict(zip(PARTS, (pack_codes(codes, bits), scale, offset, lora_a, lora_b), strict=True))
    parts |= {name: nn.Parameter(parts[name]) for name in ("lora_A", "lora_B")}
    return parts, matrix


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([4, 16, 32]),
    wider=st.sampled_from([1, 2]),
    flipped=st.booleans(),
)
def test_the_layer_and_its_weight_are_the_matrix(
    n: int, k: int, bits: int, group: int, wider: int, flipped: bool
) -> None:
    pool = group * wider
    parts, matrix = make_parts(n, k, bits, group, pool, rank=2)
    how = AdaptedWeight(bits, group, pool, 0.5, k, torch.float64)
    bias = nn.Parameter(torch.randn(n, dtype=torch.float64))
    layer = AdaptedLinear(how, parts, bias, flipped=flipped)
    x = torch.randn(3, k, dtype=torch.float64)
    torch.testing.assert_close(layer(x), functional.linear(x, matrix, bias))
    torch.testing.assert_close(layer.weight, matrix.t() if flipped else matrix)


def test_gradients_through_the_weight_are_those_through_the_layer() -> None:
    torch.manual_seed(0)
    parts, _ = make_parts(6, 40, 4, 16, 16, rank=3)
    layer = AdaptedLinear(
        AdaptedWeight(4, 16, 16, 0.5, 40, torch.float64), parts, None, flipped=False
    )
    x = torch.randn(5, 40, dtype=torch.float64)
    found = []
    for y in (layer(x), functional.linear(x, layer.weight)):
        layer.zero_grad()
        y.square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert [g.shape for g in found[0]] == [(3, 3), (6, 3)]
    torch.testing.assert_close(found[0], found[1])


def test_experts_are_stacked_matrices() -> None:
    torch.manual_seed(0)
    made = [make_parts(4, 20, 3, 8, 8, rank=2) for _ in range(3)]
    holder = nn.Module()
    register_parts(holder, {part: torch.stack([m[0][part] for m in made]) for part in PARTS})
    found = AdaptedWeight(3, 8, 8, 0.5, 20, torch.float64).matrix(holder)
    torch.testing.assert_close(found, torch.stack([matrix for _, matrix in made]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weight_has_the_dtype_that_it_stands_for(dtype: torch.dtype) -> None:
    parts, matrix = make_parts(4, 32, 4, 16, 16, rank=2)
    layer = AdaptedLinear(AdaptedWeight(4, 16, 16, 0.5, 32, dtype), parts, None, flipped=False)
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight, matrix.to(dtype))

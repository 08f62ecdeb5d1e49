"""Layers under autocast: inputs and weights are rounded to bfloat16, scales and offsets are not."""

from __future__ import annotations

import pytest
import torch

from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.ops.integer_zero_linear import KINDS, integer_zero_parameters, shorten
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.spec import EXPERT_LINEAR, GROUP_LINEAR, INTEGER_ZERO_LINEAR


def layer(n: int = 6, k: int = 64) -> tuple[torch.Tensor, ...]:
    """Codes, scale, offset and bias; scales that bfloat16 does not hold."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = 1.0 + torch.rand(n, k // 32) * 1e-3
    return pack_codes(codes, 4), scale, -7.7 * scale, torch.randn(n)


def test_inputs_and_finished_weights_are_cast() -> None:
    packed, scale, offset, bias = layer()
    x = torch.randn(3, 64, requires_grad=True)
    weight = dequantize(packed, scale, offset, bits=4, group_size=32, k=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = GROUP_LINEAR(x, packed, scale, offset, bias, 4, 32)
    assert y.dtype == torch.bfloat16
    expected = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    # Sums run in another order, and bfloat16 has 8 bits.
    apart = (y.float() - expected.float()).detach().abs().max()
    assert float(apart / expected.detach().abs().max()) < 0.01
    y.float().sum().backward()
    assert x.grad is not None
    wanted = torch.ones(3, 6) @ weight
    assert float((x.grad - wanted).abs().max() / wanted.abs().max()) < 0.01


def test_casting_the_scales_would_move_the_weights_further() -> None:
    """What the kernel is for: the error of a complete layer with rounded scales is larger."""
    packed, scale, offset, _ = layer()
    x = torch.ones(1, 64)
    exact = GROUP_LINEAR(x, packed, scale, offset, None, 4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = GROUP_LINEAR(x, packed, scale, offset, None, 4, 32).float()
    rounded = [t.bfloat16().float() for t in (scale, offset)]
    theirs = GROUP_LINEAR(x, packed, *rounded, None, 4, 32)
    assert (ours - exact).abs().mean() < (theirs - exact).abs().mean()


def test_experts_are_cast_too() -> None:
    packed, scale, offset, _ = layer()
    stacked = [torch.stack([t, t]) for t in (packed, scale, offset)]
    x, ends = torch.randn(5, 64), torch.tensor([2, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = EXPERT_LINEAR(x, *stacked, ends, 4, 32)
        one = GROUP_LINEAR(x, packed, scale, offset, None, 4, 32)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, one)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_integer_zero_points_are_cast_too(kind: str) -> None:
    """Their adapters are not: the scales and zero-points that they give are float32's."""
    packed, scale, _, bias = layer()
    scale = shorten(scale.double(), torch.float32).float()
    lora = [torch.randn(2, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)]
    operands = packed, scale, -8 * scale, bias, 4, 32, *lora, 0.1, kind
    x = torch.randn(3, 64)
    exact = INTEGER_ZERO_LINEAR(x, *operands)
    wanted = torch.autograd.grad(exact.sum(), lora)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = INTEGER_ZERO_LINEAR(x, *operands)
    assert y.dtype == torch.bfloat16
    a, b = (p.detach() for p in lora)
    parameters = integer_zero_parameters(scale, -8 * scale, a, b, 4, 0.1, kind)
    weight = dequantize(packed, *parameters, bits=4, group_size=32, k=64).bfloat16()
    expected = torch.nn.functional.linear(x.bfloat16(), weight, bias.bfloat16())
    apart = (y.float() - expected.float()).detach().abs().max()
    assert float(apart / expected.abs().max()) < 0.01
    for grad, right in zip(torch.autograd.grad(y.float().sum(), lora), wanted, strict=True):
        assert grad.dtype == torch.float32
        assert float((grad - right).norm() / right.norm()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    packed, scale, offset, _ = layer()
    x = torch.randn(3, 64, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = GROUP_LINEAR(x, packed, scale, offset, None, 4, 32)
    assert y.dtype == dtype

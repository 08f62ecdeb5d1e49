"""Min-max quantization: half a step at most, exact where a group is flat, any range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import expand_groups
from qalora_compile.quantizers.minmax import quantize_minmax

MAGNITUDES = st.sampled_from((1e-30, 1e-6, 1.0, 6e4, 1e38))


def random_weight(
    n: int, k: int, size: float, shift: float, dtype: torch.dtype, seed: int
) -> Tensor:
    """Uniform within ±size around shift · size."""
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.rand(n, k, generator=generator, dtype=torch.float64) - 1 + shift
    return (values * size).to(dtype)


def worst_steps(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Error of every element in steps of its group, beyond what storage rounding explains."""
    affine = quantize_minmax(weight, QuantSpec(bits=bits, group_size=group_size)).validate()
    k = weight.shape[1]
    step = expand_groups(affine.scale.double(), group_size, k)
    error = (affine.dequantize().double() - weight.double()).abs()
    size = expand_groups(affine.offset.double().abs(), group_size, k) + step * (2**bits - 1)
    slack = 2 * torch.finfo(affine.scale.dtype).eps * size
    return torch.where(step == 0, error, (error - slack) / step.clamp(min=1e-300))


@given(
    n=st.integers(1, 4),
    k=st.integers(1, 70),
    g=st.integers(1, 80),
    bits=st.sampled_from(SUPPORTED_BITS),
    size=MAGNITUDES,
    shift=st.sampled_from((-1.5, 0.0, 0.3, 1.5)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step(
    n: int, k: int, g: int, bits: int, size: float, shift: float, dtype: torch.dtype, seed: int
) -> None:
    weight = random_weight(n, k, size, shift, dtype, seed)
    assert float(worst_steps(weight, bits, g).max()) <= 0.5 + 1e-5


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), k=st.integers(1, 20))
def test_flat_groups_are_exact(value: float, k: int) -> None:
    weight = torch.full((2, k), value)
    affine = quantize_minmax(weight, QuantSpec(group_size=8)).validate()
    assert not affine.scale.any()
    assert not affine.codes.any()
    assert torch.equal(affine.dequantize(), weight)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 6e4, -6e4, 1e38, 1e-45])
def test_flat_groups_beside_others(bits: int, value: float) -> None:
    weight = torch.randn(3, 24)
    weight[1, 8:16] = value
    affine = quantize_minmax(weight, QuantSpec(bits=bits, group_size=8)).validate()
    assert torch.equal(affine.dequantize()[1, 8:16], weight[1, 8:16])
    assert bool(torch.isfinite(affine.zero_point()).all())
    assert float(worst_steps(weight, bits, 8).max()) <= 0.5 + 1e-5


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_both_ends_of_a_group_are_met(bits: int) -> None:
    weight = torch.randn(4, 64)
    affine = quantize_minmax(weight, QuantSpec(bits=bits, group_size=16))
    grouped = weight.unflatten(1, (4, 16))
    codes = affine.codes.unflatten(1, (4, 16))
    assert int(codes.amin()) == 0
    assert int(codes.amax()) == 2**bits - 1
    assert torch.equal(affine.offset, grouped.amin(-1))
    restored = affine.dequantize().unflatten(1, (4, 16))
    assert torch.allclose(restored.amax(-1), grouped.amax(-1), rtol=1e-6, atol=1e-7)


def test_a_known_group() -> None:
    affine = quantize_minmax(torch.tensor([[-1.0, 0.5, 2.0, 1.1]]), QuantSpec(bits=2, group_size=4))
    assert affine.offset.tolist() == [[-1.0]]
    assert affine.scale.tolist() == [[1.0]]
    assert affine.codes.tolist() == [[0, 2, 3, 2]]  # 1.5 steps round to even


def test_the_tail_group_has_its_own_range() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 100.0, 300.0]])
    affine = quantize_minmax(weight, QuantSpec(bits=8, group_size=4))
    assert affine.offset.tolist() == [[1.0, 100.0]]
    assert affine.scale[0, 1].item() == pytest.approx(200 / 255)
    assert affine.dequantize()[0, 4:].tolist() == pytest.approx([100.0, 300.0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_groups(sign: float) -> None:
    weight = sign * (torch.rand(4, 32) + 5)
    affine = quantize_minmax(weight, QuantSpec(bits=4, group_size=16)).validate()
    zero = affine.zero_point()
    assert bool((zero < 0).all() if sign > 0 else (zero > 15).all())
    assert float(worst_steps(weight, 4, 16).max()) <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_storage_dtype(dtype: torch.dtype, storage: torch.dtype) -> None:
    affine = quantize_minmax(torch.randn(3, 20).to(dtype), QuantSpec(group_size=8)).validate()
    assert affine.scale.dtype == affine.offset.dtype == storage
    assert affine.codes.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_quantized_from_their_exact_values(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 40).to(dtype)
    spec = QuantSpec(bits=4, group_size=8)
    half, wide = quantize_minmax(weight, spec), quantize_minmax(weight.float(), spec)
    assert torch.equal(half.codes, wide.codes)
    assert torch.equal(half.scale, wide.scale)
    assert torch.equal(half.offset, wide.offset)


def test_a_range_beyond_float32_is_refused_or_finite() -> None:
    """max − min does not fit float32 here, although every weight does."""
    weight = torch.tensor([[-3e38, 3e38, 0.0, 1e38]])
    try:
        affine = quantize_minmax(weight, QuantSpec(group_size=4)).validate()
    except UserInputError:
        return
    assert bool(torch.isfinite(affine.dequantize()).all())


def test_the_weight_and_its_gradient_are_left_alone() -> None:
    weight = torch.randn(3, 10, requires_grad=True)
    before = weight.detach().clone()
    affine = quantize_minmax(weight, QuantSpec(group_size=4))
    assert torch.equal(weight, before)
    assert not affine.scale.requires_grad

"""The `qalora` operators: registration, gradients, dtypes, and what backward keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.ops import linear
from qalora_compile.ir.packing.bitstream import pack_codes
from tests.ir.test_affine import make_affine

Q = torch.ops.qalora
HALVES = [torch.float16, torch.bfloat16]


def linear_arguments(
    shape: tuple[int, ...],
    n: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
) -> tuple[Any, ...]:
    """Arguments of group_linear; scale and offset are float64 for float64, else float32."""
    storage = torch.float64 if dtype == torch.float64 else torch.float32
    affine = make_affine(n, shape[-1], bits, group_size, storage)
    x = torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(n, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return x, affine.pack(), affine.scale, affine.offset, b, bits, group_size


def nbits_arguments(k: int, bits: int, block: int, dtype: torch.dtype = torch.float32) -> Any:
    """Arguments of matmul_nbits with random codes and zero-points, and the plain numbers."""
    n, blocks = 5, -(-k // block)
    codes = torch.randint(0, 2**bits, (n, blocks * block)).to(torch.uint8)
    zero = torch.randint(0, 2**bits, (n, blocks)).to(torch.uint8)
    scale = (torch.rand(n, blocks) + 0.1).to(dtype)
    packed = pack_codes(codes, bits).reshape(n, blocks, -1)
    zero_packed = pack_codes(zero, bits)[:, : -(-blocks * bits // 8)].contiguous()
    x, bias = torch.randn(3, k).to(dtype), torch.randn(n).to(dtype)
    plain = (codes.numpy().astype(np.float64), zero.numpy(), scale.double().numpy())
    return (x, packed, scale, zero_packed, bias, bits, block, 0), plain


CHECKED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "group_linear, tail, 4 bits": (Q.group_linear, linear_arguments((2, 3, 20), 5, 4, 8)),
    "group_linear, tail, 3 bits, no bias": (
        Q.group_linear,
        linear_arguments((4, 11), 5, 3, 4, bias=False),
    ),
    "group_linear, K < g": (Q.group_linear, linear_arguments((2, 5), 3, 2, 16)),
    "group_linear, K = N = 1": (Q.group_linear, linear_arguments((2, 1), 1, 8, 4)),
    "group_linear, vector": (Q.group_linear, linear_arguments((12,), 3, 4, 4)),
    "group_linear, float16": (Q.group_linear, linear_arguments((3, 20), 5, 4, 8, torch.float16)),
    "group_linear, bfloat16": (Q.group_linear, linear_arguments((3, 20), 5, 4, 8, torch.bfloat16)),
    "group_linear, float64": (Q.group_linear, linear_arguments((3, 20), 5, 4, 8, torch.float64)),
    "group_linear_input_grad": (
        Q.group_linear_input_grad,
        (torch.randn(2, 5), *(a for a in linear_arguments((2, 20), 5, 4, 8)[1:4]), 4, 8, 20),
    ),
    "group_sum, tail": (Q.group_sum, (torch.randn(2, 3, 20, requires_grad=True), 8)),
    "group_sum, g = 1": (Q.group_sum, (torch.randn(2, 6, requires_grad=True), 1)),
    "group_sum, K < g": (Q.group_sum, (torch.randn(2, 6, requires_grad=True), 32)),
    "group_sum, bfloat16": (
        Q.group_sum,
        (torch.randn(2, 20, dtype=torch.bfloat16, requires_grad=True), 8),
    ),
    "pooled_adapter": (
        Q.pooled_adapter,
        (
            torch.randn(2, 3, 4, requires_grad=True),
            torch.randn(2, 4, requires_grad=True),
            torch.randn(6, 2, requires_grad=True),
            0.5,
        ),
    ),
    "pooled_adapter, half activations": (
        Q.pooled_adapter,
        (
            torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True),
            torch.randn(2, 4, requires_grad=True),
            torch.randn(6, 2, requires_grad=True),
            0.5,
        ),
    ),
    "pad_groups, tail": (Q.pad_groups, (torch.randn(2, 3, 20), 8, 16)),
    "pad_groups, nothing to do": (Q.pad_groups, (torch.randn(2, 16), 16, 16)),
    "matmul_nbits, 4 bits, tail": (Q.matmul_nbits, nbits_arguments(40, 4, 16)[0]),
    "matmul_nbits, 8 bits": (Q.matmul_nbits, nbits_arguments(32, 8, 32)[0]),
    "matmul_nbits, 2 bits": (Q.matmul_nbits, nbits_arguments(48, 2, 16)[0]),
    "matmul_nbits, float16": (Q.matmul_nbits, nbits_arguments(40, 4, 16, torch.float16)[0]),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_opcheck(kind: str) -> None:
    op, arguments = CHECKED[kind]
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    defined = {
        name
        for name, value in vars(linear).items()
        if isinstance(value, torch._library.custom_ops.CustomOpDef)
    }
    assert {str(op).rpartition(".")[2] for op, _ in CHECKED.values()} == defined


def trained_arguments(*shape: Any, **options: Any) -> tuple[Any, ...]:
    """Arguments whose scale and offset take gradients too."""
    arguments = list(linear_arguments(*shape, **options))
    arguments[2:4] = [tensor.requires_grad_() for tensor in arguments[2:4]]
    return tuple(arguments)


@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20)])
@pytest.mark.parametrize(("g", "bits"), [(8, 4), (32, 3), (5, 2), (1, 8)])
def test_group_linear_gradients_by_scale_and_offset(
    shape: tuple[int, ...], g: int, bits: int
) -> None:
    arguments = trained_arguments(shape, 4, bits, g, torch.float64)
    assert torch.autograd.gradcheck(Q.group_linear, arguments, atol=1e-7)


def test_group_linear_keeps_its_input_only_for_scales_that_train() -> None:
    results = torch.library.opcheck(Q.group_linear.default, trained_arguments((2, 3, 20), 5, 4, 8))
    assert set(results.values()) == {"SUCCESS"}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    arguments = trained_arguments((3, 20), 5, 4, 8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Q.group_linear(*arguments)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in arguments[:4]}


@pytest.mark.parametrize(("k", "g", "bits"), [(20, 8, 4), (7, 16, 3), (12, 4, 2), (1, 1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_group_linear_gradients(k: int, g: int, bits: int, bias: bool) -> None:
    arguments = linear_arguments((3, k), 4, bits, g, torch.float64, bias=bias)
    assert torch.autograd.gradcheck(Q.group_linear, arguments, atol=1e-7)


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    k=st.integers(1, 24),
    g=st.integers(1, 26),
    bits=st.sampled_from((2, 3, 4, 8)),
)
@settings(max_examples=25)
def test_group_linear_is_the_linear_of_the_dequantized_weight(
    lead: list[int], k: int, g: int, bits: int
) -> None:
    x, packed, scale, offset, bias, *_ = linear_arguments((*lead, k), 5, bits, g, torch.float64)
    weight = make_affine(5, k, bits, g).dequantize()
    plain_x, plain_b = (t.detach().clone().requires_grad_() for t in (x, bias))
    mine = Q.group_linear(x, packed, scale, offset, bias, bits, g)
    plain = functional.linear(plain_x, weight, plain_b)
    assert torch.allclose(mine, plain, rtol=0, atol=1e-10)
    upstream = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(mine, (x, bias), upstream),
        torch.autograd.grad(plain, (plain_x, plain_b), upstream),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_group_linear_takes_strided_inputs() -> None:
    _, packed, scale, offset, bias, *_ = linear_arguments((3, 20), 5, 4, 8, torch.float64)
    x = torch.randn(20, 3, dtype=torch.float64).t()
    weight = make_affine(5, 20, 4, 8).dequantize()
    mine = Q.group_linear(x, packed, scale, offset, bias, 4, 8)
    assert torch.allclose(mine, functional.linear(x, weight, bias), rtol=0, atol=1e-10)


def test_group_linear_backward_keeps_the_packed_weight_alone() -> None:
    arguments = linear_arguments((3, 20), 5, 4, 8)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = Q.group_linear(*arguments)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in arguments[1:4]}
    assert len(kept) == 3
    y.sum().backward()
    assert arguments[0].grad.shape == arguments[0].shape


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_differs_by_one_rounding(dtype: torch.dtype) -> None:
    x, packed, scale, offset, bias, *_ = linear_arguments((6, 40), 5, 4, 8, dtype)
    weight = make_affine(5, 40, 4, 8, torch.float32).dequantize().double()
    exact = functional.linear(x.double(), weight, bias.double()).detach()
    found = Q.group_linear(x, packed, scale, offset, bias, 4, 8).detach()
    assert found.dtype == dtype
    size = functional.linear(x.detach().double().abs(), weight.abs()).max()
    bound = 8 * torch.finfo(dtype).eps * float(size)
    assert float((found.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize(("k", "g"), [(20, 8), (16, 8), (3, 8), (6, 1)])
def test_group_sum_gradients(k: int, g: int) -> None:
    x = torch.randn(2, 3, k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Q.group_sum(x, g), (x,))


def test_pooled_adapter_gradients_and_formula() -> None:
    pooled, lora_a, lora_b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (2, 4), (6, 2))
    )
    assert torch.autograd.gradcheck(
        lambda *tensors: Q.pooled_adapter(*tensors, 0.75), (pooled, lora_a, lora_b)
    )
    expected = 0.75 * (pooled @ lora_a.t()) @ lora_b.t()
    found = Q.pooled_adapter(pooled, lora_a, lora_b, 0.75)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@given(k=st.integers(1, 40), g=st.integers(1, 45), extra=st.integers(0, 9))
def test_pad_groups_pads_each_group(k: int, g: int, extra: int) -> None:
    x = torch.arange(1.0, k + 1)[None]
    padded = Q.pad_groups(x, g, g + extra)
    expected: list[float] = []
    for start in range(0, k, g):
        part = x[0, start : start + g].tolist()
        expected += part + [0.0] * (g + extra - len(part))
    assert padded.tolist() == [expected]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("k", [16, 40, 96])
def test_matmul_nbits_against_numpy(bits: int, block: int, k: int) -> None:
    arguments, (codes, zero, scale) = nbits_arguments(k, bits, block)
    expanded = np.repeat(zero, block, axis=1), np.repeat(scale, block, axis=1)
    weight = ((codes - expanded[0]) * expanded[1])[:, :k]
    x, bias = arguments[0].double().numpy(), arguments[4].double().numpy()
    found = Q.matmul_nbits(*arguments).double().numpy()
    expected = x @ weight.T + bias
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(x).max() * np.abs(weight).sum(1).max()


def test_affine_and_operator_agree_on_float32() -> None:
    affine: GroupAffine = make_affine(5, 20, 4, 8, torch.float32)
    eye = torch.eye(20)
    weight = Q.group_linear(eye, affine.pack(), affine.scale, affine.offset, None, 4, 8).t()
    assert torch.allclose(weight, affine.dequantize(), rtol=0, atol=1e-6)

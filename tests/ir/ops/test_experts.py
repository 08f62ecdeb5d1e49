"""The operators on stacked experts: registration, both forms, gradients, rows without an expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.ops import experts
from qalora_compile.ir.ops.linear import matmul_nbits_weight
from tests.ir.ops.test_linear import nbits_arguments
from tests.ir.test_affine import make_affine

Q = torch.ops.qalora
E, N, RANK = 3, 5, 2
ENDS = torch.tensor([2, 2, 6])  # the second expert gets no row, and two rows of eight no expert


def rows_of(k: int, dtype: torch.dtype, *, grouped: bool) -> tuple[Tensor, Tensor | None]:
    """X and ends in one of the two forms."""
    shape = (8, k) if grouped else (E, 4, k)
    x = torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()
    return x, ENDS if grouped else None


def codes(k: int, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked qweight, scale and offset."""
    stack = [make_affine(N, k, bits, group, dtype) for _ in range(E)]
    return (
        torch.stack([a.pack() for a in stack]),
        torch.stack([a.scale for a in stack]),
        torch.stack([a.offset for a in stack]),
    )


def plainly(x: Tensor, ends: Tensor | None, weights: Tensor) -> Tensor:
    """X times the `[E, N, K]` weights, by indexing alone."""
    if ends is None:
        return torch.einsum("etk,enk->etn", x, weights)
    expert = (torch.arange(x.shape[0])[:, None] >= ends[None]).sum(1)
    padded = torch.cat([weights, torch.zeros_like(weights[:1])])
    return torch.einsum("tk,tnk->tn", x, padded[expert])


def linear_arguments(k: int = 20, *, grouped: bool, dtype: torch.dtype = torch.float32) -> Any:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, ends = rows_of(k, dtype, grouped=grouped)
    return x, *codes(k, 4, 8, wide), ends, 4, 8


def adapter_arguments(*, grouped: bool, dtype: torch.dtype = torch.float32) -> Any:
    pooled, ends = rows_of(4, dtype, grouped=grouped)
    wide = torch.promote_types(dtype, torch.float32)
    lora_a = torch.randn(E, RANK, 4, dtype=wide, requires_grad=True)
    lora_b = torch.randn(E, N, RANK, dtype=wide, requires_grad=True)
    return pooled, lora_a, lora_b, ends, 0.5


def nbits(k: int, *, grouped: bool, corrected: bool) -> Any:
    each = [nbits_arguments(k, 4, 16)[0] for _ in range(E)]
    x, ends = rows_of(k, torch.float32, grouped=grouped)
    sums = x.detach()[..., :3] if corrected else None
    correction = [torch.randn(3, N) for _ in range(E)] if corrected else []
    lists = [[arguments[i] for arguments in each] for i in (1, 2, 3)]
    return x.detach(), sums, *lists, correction, ends, 4, 16, 0


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


CHECKED: dict[str, tuple[Any, Any]] = {}
for form in (True, False):
    CHECKED |= {
        f"expert_linear, {form}": (Q.expert_linear, linear_arguments(grouped=form)),
        f"expert_linear, bfloat16, {form}": (
            Q.expert_linear,
            linear_arguments(grouped=form, dtype=torch.bfloat16),
        ),
        f"expert_linear_input_grad, {form}": (
            Q.expert_linear_input_grad,
            (
                torch.randn(*((8, N) if form else (E, 4, N))),
                *linear_arguments(grouped=form)[1:5],
                4,
                8,
                20,
            ),
        ),
        f"expert_adapter, {form}": (Q.expert_adapter, adapter_arguments(grouped=form)),
        f"expert_adapter_grads, {form}": (
            Q.expert_adapter_grads,
            (
                torch.randn(*((8, N) if form else (E, 4, N))),
                *(detached(value) for value in adapter_arguments(grouped=form)),
            ),
        ),
        f"expert_matmul_nbits, {form}": (
            Q.expert_matmul_nbits,
            nbits(40, grouped=form, corrected=form),
        ),
    }


@pytest.mark.parametrize("kind", CHECKED)
def test_opcheck(kind: str) -> None:
    op, arguments = CHECKED[kind]
    assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    defined = {
        n for n, v in vars(experts).items() if isinstance(v, torch._library.custom_ops.CustomOpDef)
    }
    assert {kind.split(",")[0] for kind in CHECKED} == defined


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([4, 8, 16]),
    grouped=st.booleans(),
)
def test_the_linear_map_and_its_gradient(k: int, bits: int, group: int, grouped: bool) -> None:
    x, ends = rows_of(k, torch.float64, grouped=grouped)
    parts = codes(k, bits, group, torch.float64)
    stack = zip(*parts, strict=True)
    weights = torch.stack([dequantize(*p, bits=bits, group_size=group, k=k) for p in stack])
    y, expected = Q.expert_linear(x, *parts, ends, bits, group), plainly(x, ends, weights)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("grouped", [True, False])
def test_the_adapter_and_its_gradients(grouped: bool) -> None:
    pooled, lora_a, lora_b, ends, scaling = adapter_arguments(grouped=grouped, dtype=torch.float64)
    y = Q.expert_adapter(pooled, lora_a, lora_b, ends, scaling)
    expected = plainly(pooled, ends, lora_b @ lora_a * scaling)
    torch.testing.assert_close(y, expected)
    grad, leaves = torch.randn_like(y), (pooled, lora_a, lora_b)
    found = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, grad))
    if grouped:
        assert not bool(found[1][1].any()), "the expert without rows learns nothing"
        assert not bool(y[6:].any()), "rows after the last end are zeros"


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("k", [32, 40])
def test_matmul_nbits_of_each_expert(k: int, grouped: bool, corrected: bool) -> None:
    arguments = nbits(k, grouped=grouped, corrected=corrected)
    x, sums, qweight, scale, zero_point, correction, ends = arguments[:7]
    lists = zip(qweight, scale, zero_point, strict=True)
    weights = torch.stack([matmul_nbits_weight(*parts, 4, 16, k) for parts in lists])
    expected = plainly(x, ends, weights)
    if corrected:
        expected = expected + plainly(sums, ends, torch.stack(correction).mT)
    torch.testing.assert_close(Q.expert_matmul_nbits(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_activations_keep_their_dtype(dtype: torch.dtype) -> None:
    for grouped in (True, False):
        x, *rest = linear_arguments(grouped=grouped, dtype=dtype)
        y = Q.expert_linear(x, *rest)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype

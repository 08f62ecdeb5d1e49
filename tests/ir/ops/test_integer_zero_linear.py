"""A layer that trains with integer zero-points: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.ir.affine import expand_groups, has_integer_zero_points
from qalora_compile.ir.ops import linear
from qalora_compile.ir.ops.integer_zero_linear import (
    INTEGER,
    KINDS,
    SCALE,
    integer_zero_parameters,
    shorten,
)
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.quantizers.minmax import quantize_integer_zero

Q = torch.ops.qalora
FLOATS = (0, 4, 7, 8)
"""Places of the arguments that have gradients."""


def integer_zero_arguments(
    kind: str,
    shape: tuple[int, ...] = (3, 20),
    n: int = 5,
    bits: int = 4,
    group_size: int = 8,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    size: float = 0.05,
) -> tuple[Any, ...]:
    """Arguments of integer_zero_linear with an adapter of rank 2."""
    affine = quantize_integer_zero(torch.randn(n, shape[-1], dtype=dtype), bits, group_size)
    groups = affine.scale.shape[1]
    x, b, lora_a, lora_b = (
        (torch.randn(*dims, dtype=dtype) * factor).requires_grad_()
        for dims, factor in ((shape, 1), ((n,), 1), ((2, groups), 1), ((n, 2), size))
    )
    parts = (affine.pack(), affine.scale, affine.offset)
    return (x, *parts, b if bias else None, bits, group_size, lora_a, lora_b, 1.5, kind)


def by_hand(x: Tensor, *arguments: Any) -> Tensor:
    """The formula, with torch's own derivatives; rounding passes gradients straight through."""
    qweight, scale, offset, bias, bits, group_size, lora_a, lora_b, scaling, kind = arguments
    k = x.shape[-1]
    codes = unpack_codes(qweight, bits, k).to(scale.dtype)
    update, zero = scaling * (lora_b @ lora_a), (-offset / scale).round()
    if kind == SCALE:
        exact = scale * (1 + update)
        step = exact + (shorten(exact.detach(), scale.dtype) - exact).detach()
    else:
        step, moved = scale, zero - update / scale
        # Of a group of equal weights the scale has all of its bits: 0 and 1 alone are exact.
        short = shorten(scale.detach(), scale.dtype) == scale
        most = torch.where(short, 2.0**bits - 1, 1.0)
        limited = torch.minimum(moved.clamp_min(-0.5), most + 0.5)
        zero = limited + (moved.round().clamp_min(0).minimum(most) - limited).detach()
    level = codes - expand_groups(zero, group_size, k)
    y = x @ (expand_groups(step, group_size, k) * level).t()
    return y if bias is None else y + bias


CHECKED = {
    **{kind: integer_zero_arguments(kind, dtype=torch.float32) for kind in KINDS},
    "vector": integer_zero_arguments(INTEGER, (12,), 3, 2, 4, torch.float32),
    "no bias, 3 bits": integer_zero_arguments(
        SCALE, (2, 3, 11), 5, 3, 4, torch.float32, bias=False
    ),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_opcheck(kind: str) -> None:
    results = torch.library.opcheck(Q.integer_zero_linear.default, CHECKED[kind])
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_gradient() -> None:
    arguments = (torch.randn(3, 5), torch.randn(3, 20), CHECKED[SCALE][1], 4, 8)
    results = torch.library.opcheck(Q.group_code_grad.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@given(
    kind=st.sampled_from(KINDS),
    lead=st.lists(st.integers(1, 3), max_size=2),
    k=st.integers(1, 24),
    g=st.integers(1, 26),
    bits=st.sampled_from((2, 3, 4, 8)),
    size=st.sampled_from((0.01, 0.5)),
)
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_are_those_of_the_formula(
    kind: str, lead: list[int], k: int, g: int, bits: int, size: float
) -> None:
    arguments = integer_zero_arguments(kind, (*lead, k), 4, bits, g, size=size)
    mine, theirs = Q.integer_zero_linear(*arguments), by_hand(*arguments)
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    floats = [arguments[i] for i in FLOATS]
    upstream = torch.randn_like(theirs)
    for ours, other in zip(
        torch.autograd.grad(mine, floats, upstream),
        torch.autograd.grad(theirs, floats, upstream),
        strict=True,
    ):
        assert ours.shape == other.shape
        assert torch.allclose(ours, other, rtol=1e-7, atol=1e-7)


@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from((2, 3, 4, 8)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    size=st.sampled_from((0.01, 0.3, 4.0)),
)
@settings(max_examples=25, deadline=None)
def test_zero_points_stay_integers(kind: str, bits: int, dtype: torch.dtype, size: float) -> None:
    arguments = integer_zero_arguments(kind, (2, 22), 6, bits, 8, dtype, size=size)
    _, _, scale, offset, _, _, _, lora_a, lora_b, scaling, _ = arguments
    new, moved = integer_zero_parameters(scale, offset, lora_a, lora_b, bits, scaling, kind)
    assert bool(has_integer_zero_points(new.detach(), moved.detach(), bits).all())
    assert (new is scale) == (kind == INTEGER)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = integer_zero_arguments(SCALE, n=7)
    floats = [arguments[i] for i in FLOATS]
    full = torch.autograd.grad(Q.integer_zero_linear(*arguments).sum(), floats)
    monkeypatch.setattr(linear, "_TILE_ELEMENTS", {"cpu": 40})
    tiled = torch.autograd.grad(Q.integer_zero_linear(*arguments).sum(), floats)
    for mine, theirs in zip(tiled, full, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)

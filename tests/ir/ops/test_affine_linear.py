"""A layer whose scales, offsets and codes train: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qalora_compile as qc
from qalora_compile.ir.affine import expand_groups, group_count
from qalora_compile.ir.ops import linear
from qalora_compile.ir.ops.affine_linear import STEP, affine_parameters
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.quantizers.minmax import quantize_minmax

Q = torch.ops.qalora


def affine_arguments(
    shape: tuple[int, ...] = (3, 20),
    n: int = 5,
    bits: int = 4,
    group_size: int = 8,
    dtype: torch.dtype = torch.float64,
    *,
    codes: bool = True,
    bias: bool = True,
    times: int = 1,
) -> tuple[Any, ...]:
    """Arguments of affine_linear with an adapter of rank 2; codes move by up to a few."""
    k = shape[-1]
    spec = qc.QuantSpec(bits=bits, group_size=group_size)
    affine = quantize_minmax(torch.randn(n, k, dtype=dtype), spec)
    groups, pools = affine.scale.shape[1], group_count(k, times * group_size)
    x, b, lora_a, lora_b, gain, shift = (
        (torch.randn(*dims, dtype=dtype) * factor).requires_grad_()
        for dims, factor in (
            (shape, 1),
            ((n,), 1),
            ((2, pools), 1),
            ((n, 2), 0.1),
            ((n, groups), 0.2),
            ((n, k), 1 / STEP),
        )
    )
    weight = affine.pack(), affine.scale, affine.offset, b if bias else None, bits, group_size
    trained = lora_a, lora_b, gain, shift if codes else None
    return (x, *weight, *trained, times * group_size, 1.5)


def by_hand(x: Tensor, *arguments: Any) -> Tensor:
    """The formula, with torch's own derivatives; rounding passes gradients straight through."""
    qweight, scale, offset, bias, bits, group, lora_a, lora_b, gain, shift, pool, scaling = (
        arguments
    )
    k, most = x.shape[-1], 2**bits - 1
    codes = unpack_codes(qweight, bits, k).to(scale.dtype)
    if shift is not None:
        latent = (codes + STEP * shift).clamp(-0.5, most + 0.5)
        codes = latent + (latent.round().clamp(0, most) - latent).detach()
    update = expand_groups(scaling * (lora_b @ lora_a), pool, k)
    factor = expand_groups(1 + gain, group, k)
    wide = (expand_groups(each, group, k) for each in (scale, offset))
    weight = sum(part * factor for part in (codes * next(wide), next(wide))) + update
    y = x @ weight.t()
    return y if bias is None else y + bias


def gradients(y: Tensor, arguments: tuple[Any, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    floats = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(y, floats, upstream)


CHECKED = {
    "codes": affine_arguments(dtype=torch.float32),
    "no codes": affine_arguments(dtype=torch.float32, codes=False),
    "vector, wider pool": affine_arguments((12,), 3, 2, 4, torch.float32, times=2),
    "no bias, 3 bits": affine_arguments((2, 3, 11), 5, 3, 4, torch.float32, bias=False),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_opcheck(kind: str) -> None:
    results = torch.library.opcheck(Q.affine_linear.default, CHECKED[kind])
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_codes() -> None:
    _, qweight, _, _, _, bits, *_, shift, _, _ = CHECKED["codes"]
    results = torch.library.opcheck(Q.moved_codes.default, (qweight, shift.detach(), bits))
    assert set(results.values()) == {"SUCCESS"}


@given(
    codes=st.booleans(),
    lead=st.lists(st.integers(1, 3), max_size=2),
    k=st.integers(1, 24),
    g=st.integers(1, 26),
    bits=st.sampled_from((2, 3, 4, 8)),
    times=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_are_those_of_the_formula(
    codes: bool, lead: list[int], k: int, g: int, bits: int, times: int
) -> None:
    arguments = affine_arguments((*lead, k), 4, bits, g, codes=codes, times=times)
    mine, theirs = Q.affine_linear(*arguments), by_hand(*arguments)
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(theirs)
    expected = gradients(theirs, arguments, upstream)
    for ours, other in zip(gradients(mine, arguments, upstream), expected, strict=True):
        assert ours.shape == other.shape
        assert torch.allclose(ours, other, rtol=1e-7, atol=1e-7)


def test_without_gain_it_is_the_pooled_form_and_without_update_it_is_peqa() -> None:
    """Only the update: scales stay; only factors: zero-points stay, all scales are free."""
    _, _, scale, offset, _, _, group, lora_a, lora_b, gain, _, pool, scaling = affine_arguments()
    none = torch.zeros_like(gain)
    new, moved = affine_parameters(scale, offset, lora_a, lora_b, none, pool, group, scaling)
    assert torch.equal(new, scale)
    assert torch.equal(moved, offset + scaling * (lora_b @ lora_a))
    parts = scale, offset, lora_a, torch.zeros_like(lora_b), gain
    new, moved = affine_parameters(*parts, pool, group, scaling)
    assert torch.equal(new, scale * (1 + gain))
    torch.testing.assert_close(moved / new, offset / scale, rtol=1e-14, atol=0)


def test_codes_stay_within_their_width_and_take_no_gradient_beyond_it() -> None:
    x, *rest = affine_arguments((6, 16), 3, 2, 8)
    with torch.no_grad():
        rest[9][:, :8] = 10.0
    moved = unpack_codes(Q.moved_codes(rest[0], rest[9], 2), 2, 16)
    assert bool((moved[:, :8] == 3).all())
    assert int(moved.max()) <= 3
    (grad,) = torch.autograd.grad(Q.affine_linear(x, *rest).square().sum(), rest[9])
    assert not bool(grad[:, :8].any())
    assert bool(grad[:, 8:].any())


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = affine_arguments(n=7)
    upstream = torch.ones(3, 7, dtype=torch.float64)
    full = gradients(Q.affine_linear(*arguments), arguments, upstream)
    monkeypatch.setattr(linear, "_TILE_ELEMENTS", {"cpu": 40})
    tiled = gradients(Q.affine_linear(*arguments), arguments, upstream)
    for mine, theirs in zip(tiled, full, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)

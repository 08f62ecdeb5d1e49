"""Offsets given codes and scale: the closed form is the minimum, and never does harm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import expand_groups, group_count
from qalora_compile.quantizers import get_quantizer, quantize_weight
from qalora_compile.quantizers.damping import factor
from qalora_compile.quantizers.minmax import quantize_minmax
from qalora_compile.quantizers.refine import refine_offset
from qalora_compile.quantizers.statistics import ActivationStatistics
from tests.quantizers.pooled import pooled_residual


def layer(
    n: int, k: int, rows: int, seed: int, dead: int = 0
) -> tuple[Tensor, ActivationStatistics]:
    """A weight, and statistics of correlated inputs with a mean, whose first columns are zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64) @ mix + 0.5
    x[:, :dead] = 0
    return weight, ActivationStatistics.of(x)


@given(
    bits=st.sampled_from(SUPPORTED_BITS),
    k=st.integers(1, 40),
    group=st.integers(1, 45),
    rows=st.integers(1, 60),
    dead=st.integers(0, 20),
    damping=st.sampled_from((1e-9, 1e-4, 0.1)),
    seed=st.integers(0, 99),
)
def test_the_output_error_never_grows(
    bits: int, k: int, group: int, rows: int, dead: int, damping: float, seed: int
) -> None:
    weight, statistics = layer(5, k, rows, seed, dead)
    affine = quantize_minmax(weight, QuantSpec(bits=bits, group_size=group))
    change = weight - affine.dequantize()
    before = statistics.output_error(change)
    residual = pooled_residual(change, statistics, group, damping=damping)
    after = statistics.output_error(change - expand_groups(residual, group, k))
    assert after <= before * (1 + 1e-9) + 1e-12 * statistics.output_error(weight)
    refined, _ = refine_offset(weight, affine, statistics)
    assert torch.equal(refined.codes, affine.codes) and torch.equal(refined.scale, affine.scale)
    error = statistics.output_error(weight - refined.dequantize())
    assert error <= before * (1 + 1e-9) + 1e-12 * statistics.output_error(weight)


def test_it_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    k, group = 22, 8
    x = torch.randn(50, k, generator=generator, dtype=torch.float64) + 1
    change = torch.randn(3, k, generator=generator, dtype=torch.float64)
    sums = torch.stack([part.sum(1) for part in x.split(group, dim=1)], dim=1)
    expected = torch.linalg.lstsq(sums, x @ change.T).solution.T
    found = pooled_residual(change, ActivationStatistics.of(x), group, damping=1e-14)
    assert found.shape == (3, group_count(k, group))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_group_that_is_never_active_keeps_its_offset() -> None:
    weight, statistics = layer(4, 24, 60, 3, dead=8)
    affine = quantize_minmax(weight, QuantSpec(bits=2, group_size=8))
    refined, _ = refine_offset(weight, affine, statistics)
    assert torch.equal(refined.offset[:, 0], affine.offset[:, 0])
    assert not torch.equal(refined.offset[:, 1], affine.offset[:, 1])


def test_inputs_that_are_all_zero_leave_everything() -> None:
    weight, statistics = layer(4, 24, 60, 3, dead=24)
    affine = quantize_minmax(weight, QuantSpec(bits=2, group_size=8))
    refined, notes = refine_offset(weight, affine, statistics)
    assert torch.equal(refined.offset, affine.offset)
    assert notes == ("the calibration inputs are all zero: offsets stay",)


def test_damping_is_raised_until_the_factor_exists_and_told() -> None:
    vector = torch.arange(1.0, 9, dtype=torch.float64)
    singular = torch.outer(vector, vector)
    assert factor(singular + torch.eye(8), 1e-4).damping == 1e-4
    worse = singular - 1e-3 * torch.eye(8, dtype=torch.float64) * singular.diagonal().mean()
    raised = factor(worse, 1e-5)
    assert raised.damping == pytest.approx(1e-2)
    back = raised.lower @ raised.lower.T
    ridge = raised.damping * worse.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(back, worse + ridge)


def test_moments_that_are_none_are_refused() -> None:
    negative = torch.diag(torch.tensor([9.0, -9.0, 1.0], dtype=torch.float64))
    for moment in (negative, torch.full((3, 3), float("nan"), dtype=torch.float64)):
        with pytest.raises(UserInputError, match="cannot be factored"):
            factor(moment, 1e-2)


def test_another_offset_is_worse() -> None:
    weight, statistics = layer(4, 24, 60, 5)
    statistics = dataclasses.replace(statistics, rows=10**9)  # so many are hardly damped
    affine = quantize_minmax(weight, QuantSpec(bits=3, group_size=8))
    refined, _ = refine_offset(weight, affine, statistics)
    best = statistics.output_error(weight - refined.dequantize())
    for group in range(3):
        for shift in (-0.01, 0.01):
            moved = refined.offset.clone()
            moved[:, group] += shift
            other = dataclasses.replace(refined, offset=moved)
            assert statistics.output_error(weight - other.dequantize()) > best


@pytest.mark.parametrize("method", ["minmax", "hqq", "gptq"])
@pytest.mark.parametrize("rows", [4, 16, 18, 36, 144])
def test_few_rows_do_no_harm_on_others(method: str, rows: int) -> None:
    """18 groups: as many rows make M singular to rounding, and undamped offsets are 10 dB off."""
    k, group = 288, 16
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(24, k, generator=generator)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    few, fresh = (
        ActivationStatistics.of(torch.randn(n, k, generator=generator) @ mix + 0.1)
        for n in (rows, 1500)
    )
    errors, notes = {}, {}
    for refine in (False, True):
        spec = QuantSpec(bits=3, group_size=group, method=method, refine_offsets=refine)
        chosen = quantize_weight(get_quantizer(method), weight, spec, path="fc", statistics=few)
        errors[refine] = fresh.output_error(weight - chosen.affine.dequantize())
        notes[refine] = chosen.notes
    assert errors[True] <= 1.01 * errors[False]
    said = f"{rows} input rows for 18 groups: offsets damped by {144 / rows:.2g}"
    assert (said in notes[True]) == (rows < 144)
    assert not any("offsets" in note for note in notes[False])


def test_many_rows_are_hardly_damped() -> None:
    weight, statistics = layer(5, 64, 4000, 2)
    affine = quantize_minmax(weight, QuantSpec(bits=3, group_size=16))
    refined, notes = refine_offset(weight, affine, statistics)
    change = weight - affine.dequantize()
    least = pooled_residual(change, statistics, 16, damping=1e-12)
    best = statistics.output_error(change - expand_groups(least, 16, 64))
    error = statistics.output_error(weight - refined.dequantize())
    assert notes == () and error <= 1.001 * best


def test_moments_that_are_hard_to_factor_are_told() -> None:
    moment = torch.diag(torch.tensor([9.0, 9.0, -0.1], dtype=torch.float64))
    weight = torch.randn(2, 3, dtype=torch.float64)
    affine = quantize_minmax(weight, QuantSpec(bits=2, group_size=1))
    _, notes = refine_offset(weight, affine, ActivationStatistics(moment, 10**9))
    assert notes == ("damping of offsets raised to 0.1",)

"""Low-rank corrections: the best of each rank, in the metric of the layer's output."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS, QuantSpec
from qalora_compile.ir.affine import expand_groups, group_count
from qalora_compile.quantizers.low_rank import CorrectionTally, PooledCorrection
from qalora_compile.quantizers.minmax import quantize_minmax
from qalora_compile.quantizers.statistics import ActivationStatistics
from tests.quantizers.pooled import pooled_residual


def inputs(rows: int, k: int, seed: int, dead: int = 0) -> Tensor:
    """Correlated rows with a mean, whose first columns are zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64) @ mix + 0.5
    x[:, :dead] = 0
    return x


def lost(n: int, k: int, bits: int, group: int, seed: int) -> Tensor:
    """W − Wq of random weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return weight - quantize_minmax(weight, QuantSpec(bits=bits, group_size=group)).dequantize()


def after(change: Tensor, correction: PooledCorrection, rank: int, pool: int) -> Tensor:
    """What is left of a change."""
    left, right = correction.factors(rank)
    return change - expand_groups(left @ right, pool, change.shape[1])


@given(
    bits=st.sampled_from(SUPPORTED_BITS),
    n=st.integers(1, 9),
    k=st.integers(1, 40),
    group=st.integers(1, 16),
    times=st.integers(1, 3),
    rows=st.integers(1, 60),
    dead=st.integers(0, 20),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_error_never_grows_with_the_rank(
    bits: int,
    n: int,
    k: int,
    group: int,
    times: int,
    rows: int,
    dead: int,
    weighted: bool,
    seed: int,
) -> None:
    change, pool = lost(n, k, bits, group, seed), group * times
    known = ActivationStatistics.of(inputs(rows, k, seed, dead)) if weighted else None
    metric = known or ActivationStatistics(torch.eye(k, dtype=torch.float64), 1)
    correction = PooledCorrection.of(change, pool, known)
    full = min(n, group_count(k, pool))
    assert correction.values.shape == (full,)
    errors = [
        metric.output_error(after(change, correction, rank, pool)) for rank in range(full + 3)
    ]
    noise = 1e-12 * metric.output_error(torch.ones(n, k))
    for rank, (less, more) in enumerate(itertools.pairwise(errors)):
        gain = float(correction.values[rank] ** 2) if rank < full else 0.0
        assert more <= less - gain * (1 - 1e-6) + noise
    assert errors[full] == errors[-1]


@given(n=st.integers(1, 9), k=st.integers(1, 40), pool=st.integers(1, 16), seed=st.integers(0, 99))
def test_at_full_rank_it_is_the_offset_refinement(n: int, k: int, pool: int, seed: int) -> None:
    change, known = lost(n, k, 2, pool, seed), ActivationStatistics.of(inputs(50, k, seed))
    left, right = PooledCorrection.of(change, pool, known).factors(99)
    torch.testing.assert_close(
        left @ right, pooled_residual(change, known, pool), rtol=1e-7, atol=1e-9
    )


def test_without_statistics_it_is_the_mean_of_each_group() -> None:
    change = torch.randn(9, 10, dtype=torch.float64)
    left, right = PooledCorrection.of(change, 4).factors(3)
    means = torch.stack([part.mean(1) for part in change.split(4, dim=1)], 1)
    torch.testing.assert_close(left @ right, means)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_correction_of_that_rank_is_better(weighted: bool) -> None:
    change = lost(12, 40, 2, 5, 1)
    known = None
    if weighted:  # so many rows are hardly damped
        known = dataclasses.replace(ActivationStatistics.of(inputs(400, 40, 1)), rows=10**9)
    metric = known or ActivationStatistics(torch.eye(40, dtype=torch.float64), 1)
    correction = PooledCorrection.of(change, 5, known)
    best = metric.output_error(after(change, correction, 2, 5))
    left, right = (t.clone().requires_grad_() for t in correction.factors(2))
    for step in (1e-1, 1e-2, 1e-3):
        generator = torch.Generator().manual_seed(7)
        for _ in range(20):
            moved = [
                t.detach() * (1 + step * torch.randn(t.shape, generator=generator).double())
                for t in (left, right)
            ]
            error = metric.output_error(change - expand_groups(moved[0] @ moved[1], 5, 40))
            assert error > best * (1 - 1e-5)  # the damping is in the optimum


def test_inputs_that_are_all_zero_give_no_correction() -> None:
    change = torch.randn(4, 12, dtype=torch.float64)
    known = ActivationStatistics.of(torch.zeros(5, 12))
    left, right = PooledCorrection.of(change, 4, known).factors(3)
    assert not (left @ right).any()
    assert torch.isfinite(right).all()


@pytest.mark.parametrize("rows", [8, 18, 40])
def test_few_rows_do_no_harm_on_others(rows: int) -> None:
    change, x = lost(32, 288, 3, 16, 3), inputs(2000, 288, 3)
    few, fresh = (ActivationStatistics.of(part) for part in (x[:rows], x[rows:]))
    correction = PooledCorrection.of(change, 16, few)
    assert correction.notes == (
        f"{rows} input rows for 18 groups: offsets damped by {144 / rows:.2g}",
    )
    assert correction.error == pytest.approx(few.output_error(change))
    before = fresh.output_error(change)
    for rank in (1, 4, 16):
        assert fresh.output_error(after(change, correction, rank, 16)) <= 1.01 * before


def test_what_is_said_of_many_weights() -> None:
    change = lost(8, 32, 2, 8, 1)
    few = PooledCorrection.of(change, 8, ActivationStatistics.of(inputs(4, 32, 1)))
    many = PooledCorrection.of(change, 8, ActivationStatistics.of(inputs(400, 32, 1)))
    tally = CorrectionTally()
    for path, correction in (("a", few), ("b", few), ("c", many)):
        tally.add(path, [correction])
    stated = "adapters: 4 input rows for 4 groups: offsets damped by 8 (a and 1 more)"
    assert tally.notes(refined=True) == [stated]
    nothing = dataclasses.replace(many, values=many.values * 0)
    tally = CorrectionTally()
    tally.add("c", [nothing])
    assert tally.notes(refined=False) == []
    (note,) = tally.notes(refined=True)
    assert "can correct 0.0% of" in note and "refine_offsets=False" in note

"""What every method owes, and what each gains on the one before it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.config import METHODS, SUPPORTED_BITS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers import get_quantizer, needs_data, quantize_weight
from qalora_compile.quantizers.gptq import quantize_gptq
from qalora_compile.quantizers.groups import nearest_codes
from qalora_compile.quantizers.hqq import quantize_hqq
from qalora_compile.quantizers.minmax import quantize_minmax
from qalora_compile.quantizers.mse import quantize_mse
from qalora_compile.quantizers.report import QuantReport, collecting_reports
from qalora_compile.quantizers.statistics import ActivationStatistics

every_method = pytest.mark.parametrize("method", METHODS)


def inputs(k: int, rows: int, seed: int = 0, dead: int = 0) -> Tensor:
    """Rows whose columns go together and differ in size, and are not zero in the mean."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, max(2, k // 2), generator=generator, dtype=torch.float64)
    mix = torch.randn(max(2, k // 2), k, generator=generator, dtype=torch.float64)
    sizes = torch.rand(k, generator=generator, dtype=torch.float64) * 3 + 0.1
    x = (hidden @ mix + 0.3 * torch.randn(rows, k, generator=generator).double() + 0.5) * sizes
    x[:, :dead] = 0
    return x


def heavy_tailed(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    return weight * torch.rand(n, k, generator=generator).clamp_min(0.05) ** -0.5


def run(
    weight: Tensor, statistics: ActivationStatistics | None, **options: Any
) -> tuple[GroupAffine, QuantReport]:
    spec = QuantSpec(**options)
    with collecting_reports() as reports:
        chosen = quantize_weight(
            get_quantizer(spec.method), weight, spec, path="fc", statistics=statistics
        )
    (report,) = reports
    return chosen.affine, report


@given(
    method=st.sampled_from(METHODS),
    bits=st.sampled_from(SUPPORTED_BITS),
    k=st.integers(1, 40),
    group=st.integers(1, 45),
    rows=st.integers(1, 50),
    dead=st.integers(0, 40),
    size=st.sampled_from((1e-30, 1e-6, 1.0, 6e4, 1e37)),
    order=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_weight_and_data_give_a_legal_result(
    method: str,
    bits: int,
    k: int,
    group: int,
    rows: int,
    dead: int,
    size: float,
    order: bool,
    seed: int,
) -> None:
    weight = torch.randn(4, k, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] = weight[0, 0]
    statistics = ActivationStatistics.of(inputs(k, rows, seed, dead))
    affine, report = run(
        weight,
        statistics,
        method=method,
        bits=bits,
        group_size=group,
        act_order=order,
        refine_offsets=False,
    )
    assert (affine.shape, affine.bits, affine.group_size) == ((4, k), bits, group)
    assert affine.scale.dtype == affine.offset.dtype == torch.float32
    span = weight.double().amax(1) - weight.double().amin(1)
    lost = (weight.double() - affine.dequantize().double()).abs().amax(1)
    assert bool((lost <= 2 * span + 1e-6 * size).all()), "levels stay near the weights"
    assert report.rows == rows and report.output_sqnr_db is not None


@every_method
def test_a_group_of_equal_weights_is_exact(method: str) -> None:
    weight = torch.full((3, 20), 0.7)
    weight[1, 8:16] = -2.5
    affine, report = run(
        weight,
        ActivationStatistics.of(inputs(20, 30)),
        method=method,
        group_size=4,
        refine_offsets=False,
    )
    assert torch.equal(affine.dequantize(), weight)
    assert report.weight_sqnr_db == math.inf


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(method: str, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 20).to(dtype)
    statistics = ActivationStatistics.of(inputs(20, 60))
    affine, report = run(weight, statistics, method=method, bits=8, group_size=8)
    assert affine.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert report.weight_sqnr_db > 35


@given(bits=st.sampled_from((2, 3, 4)), group=st.integers(2, 40), seed=st.integers(0, 99))
def test_by_the_weights_each_method_is_no_worse_than_the_one_before(
    bits: int, group: int, seed: int
) -> None:
    weight = heavy_tailed(6, 37, seed)
    lost = []
    for method in ("minmax", "mse", "hqq"):
        affine, _ = run(weight, None, method=method, bits=bits, group_size=group)
        lost.append(float((weight - affine.dequantize()).double().square().sum()))
    rounding = 1e-10 * float(weight.double().square().sum())
    assert lost[1] <= lost[0] * (1 + 1e-5) + rounding
    assert lost[2] <= lost[1] * (1 + 1e-5) + rounding


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("refine", [False, True])
def test_by_the_outputs_each_method_beats_the_one_before(bits: int, refine: bool) -> None:
    weight, x = heavy_tailed(48, 96, 5), inputs(96, 4000, 5)
    statistics, fresh = (ActivationStatistics.of(part) for part in x.split(2000))
    found = {}
    for method in METHODS:
        options: dict[str, Any] = {"method": method, "bits": bits, "refine_offsets": refine}
        affine, report = run(weight, statistics, **options)
        change = weight.double() - affine.dequantize().double()
        found[method] = 10 * math.log10(fresh.output_error(weight) / fresh.output_error(change))
        assert report.output_sqnr_db == pytest.approx(found[method], abs=1)
    assert found["mse"] > found["minmax"] + 0.3
    assert found["hqq"] > found["mse"] - 0.02
    assert found["gptq"] > found["hqq"] + 2


@given(
    bits=st.sampled_from((2, 3, 4)),
    group=st.integers(2, 40),
    rows=st.integers(1, 60),
    refine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_by_the_calibrated_outputs_hqq_is_no_worse_than_mse(
    bits: int, group: int, rows: int, refine: bool, seed: int
) -> None:
    """Row by row of the weight; a row of the float32 result may differ by its rounding."""
    weight, statistics = heavy_tailed(6, 37, seed), ActivationStatistics.of(inputs(37, rows, seed))
    mse, hqq = (
        statistics.row_errors(
            weight.double()
            - run(
                weight,
                statistics,
                method=method,
                bits=bits,
                group_size=group,
                refine_offsets=refine,
            )[0]
            .dequantize()
            .double()
        )
        for method in ("mse", "hqq")
    )
    rounding = 1e-9 * statistics.row_errors(weight)
    assert bool((hqq <= mse * (1 + 1e-6) + rounding).all())


@pytest.mark.parametrize("order", [True, False])
def test_gptq_makes_up_for_errors(order: bool) -> None:
    """At the same scale and offset, the codes chosen one after another beat the nearest."""
    weight, statistics = heavy_tailed(16, 70), ActivationStatistics.of(inputs(70, 500))
    spec = QuantSpec(bits=3, group_size=32, method="gptq", act_order=order)
    affine = quantize_gptq(weight, spec, statistics).affine
    codes = nearest_codes(weight, affine.scale, affine.offset, spec)
    nearest = GroupAffine(codes, affine.scale, affine.offset, 3, 32)
    errors = [statistics.output_error(weight - a.dequantize()) for a in (affine, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_gptq_on_inputs_that_do_not_go_together_rounds_to_nearest() -> None:
    weight = torch.randn(6, 24)
    statistics = ActivationStatistics(torch.eye(24, dtype=torch.float64), 10**6)
    spec = QuantSpec(bits=3, group_size=8, method="gptq")
    affine = quantize_gptq(weight, spec, statistics).affine
    assert torch.equal(affine.codes, nearest_codes(weight, affine.scale, affine.offset, spec))


def test_an_error_passed_to_no_column_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.addr_
    weight, statistics = heavy_tailed(16, 70), ActivationStatistics.of(inputs(70, 500))
    options: dict[str, Any] = {"method": "gptq", "bits": 3, "group_size": 32}
    _, right = run(weight, statistics, **options)
    monkeypatch.setattr(torch.Tensor, "addr_", lambda self, *_, alpha: real(self, *_, alpha=0))
    _, wrong = run(weight, statistics, **options)
    assert right.output_sqnr_db is not None and wrong.output_sqnr_db is not None
    assert wrong.output_sqnr_db < right.output_sqnr_db - 2


def test_few_rows_raise_the_damping_and_it_is_said() -> None:
    weight = torch.randn(4, 32)
    few, many = (
        run(weight, ActivationStatistics.of(inputs(32, rows)), method="gptq")[1].notes
        for rows in (16, 4000)
    )
    assert few == ("damping raised to 0.5", "16 input rows for 32 columns")
    assert many == ()


def test_moments_that_cannot_be_factored_raise_the_damping_then_fail() -> None:
    weight, moment = torch.randn(4, 8), torch.eye(8, dtype=torch.float64)
    moment[0, 1] = moment[1, 0] = 1.05  # the least eigenvalue is -0.05
    _, report = run(
        weight, ActivationStatistics(moment, 10**6), method="gptq", refine_offsets=False
    )
    assert report.notes == ("damping raised to 0.1",)
    moment[0, 1] = moment[1, 0] = 3.0
    with pytest.raises(UserInputError, match="cannot be factored") as caught:
        run(weight, ActivationStatistics(moment, 10**6), method="gptq")
    assert caught.value.where == "fc"


def test_dead_columns_are_counted_and_dead_inputs_leave_nothing_to_weigh() -> None:
    weight = torch.randn(4, 32)
    some = run(weight, ActivationStatistics.of(inputs(32, 4000, dead=5)), method="gptq")[1]
    assert some.notes == ("5 columns are never active",)
    dead = run(weight, ActivationStatistics.of(inputs(32, 4000, dead=32)), method="gptq")[1]
    assert dead.notes == (
        "the calibration inputs are all zero: rounded to the nearest",
        "the calibration inputs are all zero: offsets stay",
    )
    assert dead.weight_sqnr_db > 15


@pytest.mark.parametrize("method", [m for m in METHODS if needs_data(m)])
def test_data_are_asked_for(method: str) -> None:
    with pytest.raises(UserInputError, match="needs calibration data"):
        run(torch.randn(3, 8), None, method=method)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserInputError, match="no quantizer 'magic'"):
        get_quantizer("magic")


def test_an_outlier_is_cut_off_where_that_pays() -> None:
    weight = torch.linspace(-1, 1, 64).repeat(2, 1)
    weight[0, 0] = 2.0
    spec = QuantSpec(bits=4, group_size=64)
    complete = quantize_minmax(weight, spec).scale[:, 0]
    for found in (quantize_mse(weight, spec), quantize_hqq(weight, spec).affine):
        kept = (found.scale[:, 0] / complete).tolist()
        assert kept[0] < 0.97
        assert kept[1] > 0.94

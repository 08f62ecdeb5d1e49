"""Comparison of tensors, tolerances and reports."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.errors import UserInputError, VerificationError
from qalora_compile.verdict import Verdict
from qalora_compile.verify.compare import (
    Comparison,
    Report,
    Tolerance,
    compare,
    worst_of,
)


def test_a_known_difference_has_known_figures() -> None:
    found = compare("y", torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.5]))
    assert found.max_abs == 0.5
    assert found.max_rel == 0.125
    assert found.scale == 4.0
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))


def test_equal_tensors_have_no_error() -> None:
    x = torch.tensor([1.0, -math.inf, 0.0])
    found = compare("y", x, x.clone())
    assert (found.max_abs, found.max_rel, found.sqnr_db) == (0.0, 0.0, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_never_admitted(bad: float) -> None:
    found = compare("y", torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad]))
    assert not Tolerance(max_abs=1e30).admits(found)
    assert not Tolerance(max_rel=1e30).admits(found)


def test_nan_in_both_models_is_a_problem_too() -> None:
    nan = torch.tensor([math.nan])
    assert not Tolerance(max_abs=1.0).admits(compare("y", nan, nan))


def test_unlike_shapes_are_named() -> None:
    found = compare("y", torch.zeros(2), torch.zeros(3))
    assert "[2]" in found.problem
    assert not Tolerance(max_abs=1e9).admits(found)


@pytest.mark.parametrize(
    ("reference", "candidate", "said"),
    [
        ([49_150, 3], [49_151, 3], "1 of 2 integers differ"),
        ([2**53, 1], [2**53 + 1, 2], "2 of 2 integers differ"),  # float64 sees one
        ([True, False], [True, True], "1 of 2 integers differ"),
        ([7, 7], [7, 7], ""),
    ],
)
def test_integers_are_equal_or_wrong(reference: list[int], candidate: list[int], said: str) -> None:
    found = compare("token", torch.tensor(reference), torch.tensor(candidate))
    assert found.problem == said
    wide = Tolerance(max_abs=10.0, max_rel=1.0)
    assert wide.admits(found) == (not said)
    assert wide.admits(worst_of([found])) == (not said)


def test_numbers_that_one_model_holds_as_floats_are_compared_as_such() -> None:
    found = compare("y", torch.tensor([100]), torch.tensor([100.5]))
    assert found.problem == "" and Tolerance(max_abs=1.0).admits(found)


def test_an_error_on_a_zero_reference_is_infinitely_large_in_proportion() -> None:
    assert compare("y", torch.zeros(2), torch.tensor([0.0, 1e-9])).max_rel == math.inf


@pytest.mark.parametrize(
    "values", [{}, {"max_abs": -1.0}, {"max_rel": math.nan}, {"rounding": True}]
)
def test_a_tolerance_that_admits_anything_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserInputError):
        Tolerance(**values)


def test_every_bound_counts() -> None:
    found = Comparison("y", max_abs=0.1, max_rel=0.01, sqnr_db=40.0, scale=10.0)
    assert Tolerance(max_abs=0.1, max_rel=0.01, min_sqnr_db=40.0).admits(found)
    assert not Tolerance(max_abs=0.09).admits(found)
    assert not Tolerance(max_rel=0.009).admits(found)
    assert not Tolerance(min_sqnr_db=41.0).admits(found)


@pytest.mark.parametrize(
    ("ratio", "near", "far"),
    [(1.0, True, True), (8.0, True, True), (9.0, True, False), (64.0, False, False)],
)
def test_rounding_outweighs_the_figures_where_it_is_clear(
    ratio: float, near: bool, far: bool
) -> None:
    for max_abs, admitted in ((1e-5, near), (1e-3, far)):
        found = Comparison("y", max_abs, max_abs, 40.0, 1.0, rounding=ratio)
        assert Tolerance(max_rel=1e-4, rounding=True).admits(found) == admitted
        assert Tolerance(max_rel=1e-4).admits(found) == (max_abs <= 1e-4)
    assert "what rounding explains" in str(Tolerance(max_rel=1e-4, rounding=True))


def test_an_absolute_bound_is_transferred_to_a_larger_site() -> None:
    site = Comparison("s", max_abs=0.1, max_rel=1e-3, sqnr_db=60.0, scale=100.0)
    assert not Tolerance(max_abs=0.01).admits(site)
    assert Tolerance(max_abs=0.01).admits(site, output_scale=1.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5))
def test_the_worst_of_several_holds_for_all(errors: list[float]) -> None:
    items = [Comparison("y", e, e / 2, 100 - e, 1.0) for e in errors]
    worst = worst_of(items)
    assert worst.max_abs == max(errors)
    assert worst.sqnr_db == min(100 - e for e in errors)


def report(verdict: Verdict) -> Report:
    row = Comparison("y", 1.0, 0.5, math.inf, 2.0)
    return Report("a", "b", Tolerance(max_abs=0.1), 1, (row,), (row,), "fc", verdict)


def test_a_failed_report_raises_and_carries_itself() -> None:
    failed = report(Verdict.DIFFERENT)
    with pytest.raises(VerificationError, match="differs from a by 1") as caught:
        failed.check()
    assert caught.value.report is failed
    assert "fc" in str(caught.value)
    assert report(Verdict.EQUAL).check().passed


def test_a_report_is_json_without_infinities() -> None:
    text = json.dumps(report(Verdict.EQUAL).to_json(), allow_nan=False)
    assert json.loads(text)["outputs"][0]["sqnr_db"] is None
    assert "max abs" in str(report(Verdict.EQUAL))

"""Second moments of a layer's input: what they say of its output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import sum_groups
from qalora_compile.quantizers.statistics import ActivationStatistics


@given(
    rows=st.integers(1, 9), k=st.integers(1, 20), group=st.integers(1, 7), seed=st.integers(0, 9)
)
def test_errors_and_group_sums_are_those_of_the_rows(
    rows: int, k: int, group: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, k, generator=generator)
    change = torch.randn(3, k, generator=generator)
    found = ActivationStatistics.of(x)
    expected = (x.double() @ change.double().T).square().sum(-1).mean()
    assert found.output_error(change) == pytest.approx(float(expected), rel=1e-9)

    sums = sum_groups(x.double(), group).flatten(0, 1)
    sums_sums, sums_x = found.pooled(group)
    torch.testing.assert_close(sums_sums, sums.T @ sums / len(sums))
    torch.testing.assert_close(sums_x, sums.T @ x.double().flatten(0, 1) / len(sums))


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    x = torch.randn(11, 6)
    complete = ActivationStatistics.of(x)
    parts = ActivationStatistics.of(x[:4]).merged(ActivationStatistics.of(x[4:]))
    assert parts.rows == complete.rows == 11
    torch.testing.assert_close(parts.moment, complete.moment)


@pytest.mark.parametrize(
    ("x", "match"), [(torch.empty(0, 4), "no input row"), (torch.tensor([[float("nan")]]), "NaN")]
)
def test_useless_rows_are_refused(x: torch.Tensor, match: str) -> None:
    with pytest.raises(UserInputError, match=match):
        ActivationStatistics.of(x)

"""Numbers derived from an adapter's specification."""

from __future__ import annotations

import math

import pytest

from qalora_compile.config import AdapterSpec
from qalora_compile.errors import UserInputError


def test_scaling() -> None:
    assert AdapterSpec(rank=16, alpha=32.0).scaling == 2.0
    assert AdapterSpec(rank=16, alpha=32.0, use_rslora=True).scaling == 8.0
    chosen = AdapterSpec(rank="auto", alpha=32.0, rank_budget=1000)
    assert [chosen.scaling_at(rank) for rank in (4, 64)] == [8.0, 0.5]
    with pytest.raises(UserInputError, match="'auto'"):
        _ = chosen.scaling


@pytest.mark.parametrize(
    ("pooling", "factor"),
    [
        ("sum", 1.0),
        ("mean", 1 / 32),
        ("mean_times_groups", 4 / 32),
        ("scaled_sum", 1 / math.sqrt(32)),
    ],
)
def test_pooling_factor(pooling: str, factor: float) -> None:
    assert AdapterSpec(pooling=pooling).pooling_factor(32, 4) == factor

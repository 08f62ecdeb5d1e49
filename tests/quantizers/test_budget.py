"""Budgets: what is chosen fits, and nothing that fits is better."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_compile.errors import UserInputError
from qalora_compile.quantizers import budget as module
from qalora_compile.quantizers.budget import Choice, choose_within, distribute_ranks

CHOICES = st.builds(Choice, cost=st.integers(1, 40), loss=st.floats(0, 10))
ITEMS = st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4)


def loss_of(items: list[list[Choice]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    picked = [item[index] for item, index in zip(items, chosen, strict=True)]
    return sum(c.cost for c in picked), sum(c.loss for c in picked)


@given(items=ITEMS, budget=st.integers(1, 200), times=st.sampled_from((1, 13_824)))
def test_the_choice_is_the_best_that_fits(
    items: list[list[Choice]], budget: int, times: int
) -> None:
    scaled = [[Choice(c.cost * times, c.loss) for c in item] for item in items]
    choices = itertools.product(*(range(len(item)) for item in items))
    fitting = [
        loss
        for cost, loss in (loss_of(scaled, index) for index in choices)
        if cost <= budget * times
    ]
    if not fitting:
        with pytest.raises(UserInputError, match="exceed the budget"):
            choose_within(scaled, budget * times)
        return
    cost, loss = loss_of(scaled, choose_within(scaled, budget * times))
    assert cost <= budget * times
    assert loss == pytest.approx(min(fitting))


@given(items=ITEMS, budget=st.integers(1, 200))
def test_costs_without_a_divisor_are_rounded_up(items: list[list[Choice]], budget: int) -> None:
    """In eight parts of the budget: it fits, and is no worse than the best with less to spend."""
    least = sum(min(c.cost for c in item) for item in items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_UNITS", 8)
        if budget < least:
            return
        cost, loss = loss_of(items, choose_within(items, budget))
    assert cost <= budget
    less = budget - len(items) * math.ceil((budget - least + 1) / 8)
    if less >= least:
        assert loss <= loss_of(items, choose_within(items, less))[1] + 1e-9


GAINS = st.lists(st.floats(0, 10), min_size=1, max_size=4).map(lambda g: sorted(g, reverse=True))


@given(
    gains=st.dictionaries(st.sampled_from("abcd"), GAINS, min_size=1),
    costs=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    budget=st.integers(1, 80),
)
@settings(max_examples=60)
def test_ranks_are_best_but_for_one_step(
    gains: dict[str, list[float]], costs: list[int], budget: int
) -> None:
    cost = dict(zip("abcd", costs, strict=True))
    least = sum(cost[name] for name in gains)
    if budget < least:
        with pytest.raises(UserInputError, match="rank 1") as caught:
            distribute_ranks(gains, cost, budget)
        assert str(least) in str(caught.value.hint)
        return
    ranks = distribute_ranks(gains, cost, budget)
    assert all(1 <= ranks[name] <= len(gains[name]) for name in gains)
    assert sum(cost[name] * rank for name, rank in ranks.items()) <= budget

    def gain(name: str, rank: int) -> float:
        return sum(gains[name][:rank])

    items = [
        [Choice(cost[n] * (i + 1), -gain(n, i + 1)) for i in range(len(gains[n]))] for n in gains
    ]
    best = -loss_of(items, choose_within(items, budget))[1]
    found = sum(gain(name, rank) for name, rank in ranks.items())
    assert found >= best - max((g[1] for g in gains.values() if len(g) > 1), default=0.0) - 1e-9


def test_ranks_go_where_they_gain_most_for_their_cost() -> None:
    gains = {"steep": [9.0, 5.0, 1.0], "flat": [3.0, 3.0, 3.0], "dear": [9.0, 8.0]}
    costs = {"steep": 1, "flat": 1, "dear": 10}
    assert distribute_ranks(gains, costs, 15) == {"steep": 2, "flat": 3, "dear": 1}
    assert distribute_ranks(gains, costs, 99) == {"steep": 3, "flat": 3, "dear": 2}

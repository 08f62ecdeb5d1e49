"""Distributes a budget of bits or ranks over layers so that the loss is least."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qalora_compile.errors import UserInputError

_MOST_UNITS = 1 << 16
"""Costs without a large common divisor are rounded up to this fraction of the budget."""


@dataclass(frozen=True)
class Choice:
    """An option for an item: its cost, an integer, and its loss."""

    cost: int
    loss: float


def distribute_ranks(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks of all adapters within a budget: 1 each, then more where they gain most for the cost.

    Gains decrease from rank to rank, so this greedy rule is optimal except for the unused rest of
    the budget, which is less than one rank of one layer.

    Args:
        gains: The gain of each rank of an adapter, in decreasing order.
        costs: Number of parameters of one rank.
        budget: Largest number of parameters of all adapters.

    Raises:
        UserInputError: rank 1 for every adapter exceeds the budget.
    """
    least = sum(costs[name] for name in gains)
    if budget < least:
        raise UserInputError(
            f"a budget of {budget} parameters does not give every adapter rank 1",
            hint=f"the least is {least}",
        )
    left, ranks = budget - least, dict.fromkeys(gains, 1)
    queue = [_next(name, 1, gains, costs) for name in gains if len(gains[name]) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > left:
            continue
        left -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(gains[name]):
            heapq.heappush(queue, _next(name, ranks[name], gains, costs))
    return ranks


def _next(
    name: str, rank: int, gains: Mapping[str, Sequence[float]], costs: Mapping[str, int]
) -> tuple[float, str]:
    """Key of the rank after `rank` in a queue sorted by gain for the cost."""
    return -gains[name][rank] / costs[name], name


def choose_within(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of a choice for each item, such that the loss is least within the budget.

    A multiple-choice knapsack problem, solved by dynamic programming over the budget. The result is
    exact if the costs have a common divisor of at least 2⁻¹⁶ of the budget. Otherwise costs are
    rounded up to 2⁻¹⁶ of the budget, so that the result fits but may be suboptimal.

    Raises:
        UserInputError: the cheapest choices do not fit.
    """
    least = sum(min(choice.cost for choice in item) for item in items)
    if budget < least:
        raise UserInputError("the cheapest choices exceed the budget")
    left = budget - least
    spare = [[c.cost - min(o.cost for o in item) for c in item] for item in items]
    unit = math.gcd(*(cost for costs in spare for cost in costs))
    unit = max(unit, -(-min(left, sum(map(max, spare))) // _MOST_UNITS), 1)
    steps = [[-(-cost // unit) for cost in costs] for costs in spare]
    best = torch.zeros(min(left // unit, sum(map(max, steps))) + 1, dtype=torch.float64)
    taken = []
    for item, units in zip(items, steps, strict=True):
        losses = torch.full((len(item), len(best)), math.inf, dtype=torch.float64)
        for row, choice, step in zip(losses, item, units, strict=True):
            if step < len(best):
                row[step:] = best[: len(best) - step] + choice.loss
        best, chosen = losses.min(0)
        taken.append(chosen.to(torch.uint8))
    at, found = len(best) - 1, []
    for chosen, units in zip(reversed(taken), reversed(steps), strict=True):
        found.append(int(chosen[at]))
        at -= units[found[-1]]
    return found[::-1]

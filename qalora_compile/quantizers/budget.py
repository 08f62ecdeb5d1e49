"""Where to spend a budget: bits and ranks, layer by layer, by what they gain."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qalora_compile.errors import UserInputError

_MOST_UNITS = 1 << 16
"""Costs that share no large divisor are counted in so many parts of the budget, rounded up."""


@dataclass(frozen=True)
class Choice:
    """One way to treat an item: what it costs, a whole number, and what is lost with it."""

    cost: int
    loss: float


def distribute_ranks(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks of all adapters within a budget: 1 each, then where the next gains most for its cost.

    Gains fall from rank to rank, so this greedy rule is optimal but for what is left of the budget
    at the end, which is less than one rank of one layer.

    Args:
        gains: What each rank of an adapter gains, from the first on, falling.
        costs: Parameters of one rank.
        budget: Most parameters of all adapters.

    Raises:
        UserInputError: rank 1 everywhere is beyond it.
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
    """Key of the rank after `rank` in a queue that gives the largest gain for its cost first."""
    return -gains[name][rank] / costs[name], name


def choose_within(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """One choice for each item, by number, such that the loss is least and the costs fit.

    A multiple-choice knapsack, solved by dynamic programming over the budget: exactly, where the
    costs are multiples of a number of which the budget holds at most 2¹⁶; else with costs rounded
    up to 2⁻¹⁶ of the budget, so that the result fits, and would be optimal with so much less.

    Raises:
        UserInputError: the cheapest choices do not fit.
    """
    least = sum(min(choice.cost for choice in item) for item in items)
    if budget < least:
        raise UserInputError("the cheapest choices are beyond the budget")
    left = budget - least
    spare = [[c.cost - min(o.cost for o in item) for c in item] for item in items]
    unit = math.gcd(*(cost for costs in spare for cost in costs))
    unit = max(unit, -(-min(left, sum(map(max, spare))) // _MOST_UNITS), 1)
    steps = [[-(-cost // unit) for cost in costs] for costs in spare]
    best = torch.zeros(min(left // unit, sum(map(max, steps))) + 1, dtype=torch.float64)
    taken = []
    for item, units in zip(items, steps, strict=True):
        modes = torch.full((len(item), len(best)), math.inf, dtype=torch.float64)
        for way, choice, step in zip(modes, item, units, strict=True):
            if step < len(best):
                way[step:] = best[: len(best) - step] + choice.loss
        best, chosen = modes.min(0)
        taken.append(chosen.to(torch.uint8))
    at, found = len(best) - 1, []
    for chosen, units in zip(reversed(taken), reversed(steps), strict=True):
        found.append(int(chosen[at]))
        at -= units[found[-1]]
    return found[::-1]

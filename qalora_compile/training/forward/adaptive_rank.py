"""Ranks that move between layers while adapters train, within one budget (after AdaLoRA).

A rank of an adapter is one row of A and one column of B. The importance of each number w of them is
the product of two running means (arXiv 2303.10512, Eq. 8 to 12, with g the gradient by w):

    sensitivity I ← β I + (1 − β) |w g|        uncertainty U ← β U + (1 − β) ||w g| − I|

A rank counts the mean of I · U over its row plus that over its column. After each step the least
important ranks beyond the budget get a column of zeros in B, so that they change nothing; their
gradients go on, so that they may come back. The budget falls by a cubic curve from all ranks to
the target, and in the last part of the training the ranks that are left stay.

The paper trains P Λ Q with nearly orthogonal P and Q and sets entries of Λ to zero. Here a column
of B takes their place: no term is added to the loss, and zeros fold as all other numbers do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qalora_compile.errors import UserInputError
from qalora_compile.ir.stages import ADAPTER_NAMES

_BETA = 0.85
_FIRST, _LAST = 0.1, 0.6
"""Between these parts of all steps the budget falls."""
_OF_A, _OF_B = -1, -2
"""The axis of A and of B along which a rank's numbers lie."""


def budget_at(step: int, steps: int, ranks: int, target: int) -> int:
    """How many of all `ranks` may be in use after a step, which counts from 1 (Eq. 13)."""
    first, last = _FIRST * steps, _LAST * steps
    left = 1 - min(max((step - first) / (last - first), 0.0), 1.0)
    return target + round((ranks - target) * left**3)


class RankAllocator:
    """Chooses the ranks that remain in use, and sets the others to zero in place.

    Args:
        parameters: The trained parameters by name; `….lora_A` `[.., r, L]` and `….lora_B`
            `[.., N, r]` are used, all others left alone.
        target: Mean rank of an adapter that remains.
        steps: Of the training.

    Attributes:
        state: All that a checkpoint has to hold, by name: `…:I` and `…:U` of each A and B, and
            `…:kept` of each B, uint8, 1 for each rank in use.

    Raises:
        UserInputError: the adapters have no more ranks than that.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], target: float, steps: int
    ) -> None:
        named, (first, second) = dict(parameters), ADAPTER_NAMES
        paths = [n.removesuffix(first) for n in named if n.rpartition(".")[2] == first]
        self._pairs = {f"{p}{second}": (named[f"{p}{first}"], named[f"{p}{second}"]) for p in paths}
        self._steps = steps
        kept = {
            n: torch.ones_like(a[..., 0], dtype=torch.uint8) for n, (a, _) in self._pairs.items()
        }
        self._ranks = sum(mask.numel() for mask in kept.values())
        adapters = sum(mask[..., 0].numel() for mask in kept.values())
        self._target = max(1, round(target * adapters))
        if self._target >= self._ranks:
            raise UserInputError(
                f"adaptive_rank is {target:g}, and the adapters have a mean rank of "
                f"{self._ranks / max(1, adapters):g}: nothing can be taken from any",
                hint="insert adapters of a larger rank: about 1.5 times adaptive_rank is usual",
            )
        self.state: dict[str, Tensor] = {f"{name}:kept": mask for name, mask in kept.items()}
        for name, (a, b) in self._pairs.items():
            for of, tensor in (("A", a), ("B", b)):
                for part in "IU":
                    self.state[f"{name}:{of}{part}"] = torch.zeros_like(tensor.detach())

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Choose the ranks in use after a step of the optimizer, whose gradients are still there.

        Args:
            number: Number of steps done, this one included.
        """
        if number <= _LAST * self._steps:
            scores = [self._score(name, *pair) for name, pair in self._pairs.items()]
            budget = budget_at(number, self._steps, self._ranks, self._target)
            self._choose(torch.cat([score.flatten() for score in scores]), budget)
        for name, (_, b) in self._pairs.items():
            b.mul_(self.state[f"{name}:kept"].to(b.device).unsqueeze(_OF_B))

    def _score(self, name: str, a: nn.Parameter, b: nn.Parameter) -> Tensor:
        """Update the running means of an adapter; the importance of its ranks, `[.., r]`."""
        score = torch.zeros_like(a[..., 0])
        for of, parameter, axis in (("A", a, _OF_A), ("B", b, _OF_B)):
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            mean, spread = (self.state[f"{name}:{of}{p}"].to(now.device) for p in "IU")
            mean = _BETA * mean + (1 - _BETA) * now
            spread = _BETA * spread + (1 - _BETA) * (now - mean).abs()
            self.state |= {f"{name}:{of}I": mean, f"{name}:{of}U": spread}
            score += (mean * spread).mean(axis)
        return score

    def _choose(self, scores: Tensor, budget: int) -> None:
        """Keep the most important ranks; of equal ones the first."""
        order = scores.sort(descending=True, stable=True).indices
        mask = torch.zeros_like(scores, dtype=torch.uint8)
        mask[order[:budget]] = 1
        sizes = [self.state[f"{name}:kept"].numel() for name in self._pairs]
        for name, part in zip(self._pairs, mask.split(sizes), strict=True):
            self.state[f"{name}:kept"] = part.reshape(self.state[f"{name}:kept"].shape).clone()

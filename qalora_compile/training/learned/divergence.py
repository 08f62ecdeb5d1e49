"""How far a model's predictions are from those of another: their divergence, on stored rows.

The other model, the teacher, is run once. Of each of its rows, the largest log-probabilities are
stored, and the probability of all other tokens as one number, so a row of any vocabulary takes
about 2 KB. The divergence of these outcomes is a lower bound of that of the complete rows, and 0
where both models agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_KEPT = 256
"""Number of tokens of a row whose probabilities are stored."""


@dataclass(frozen=True)
class TeacherRows:
    """The predictions of the teacher for n tokens.

    Attributes:
        index: The k likeliest tokens, int32 `[n, k]`.
        log_probs: Their log-probabilities in nats, `[n, k]`.
        rest: The logarithm of the probability of all others, `[n]`; −inf if there are none.
    """

    index: Tensor
    log_probs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> TeacherRows:
        """Store rows of logits, `[n, V]`."""
        log_probs = logits.log_softmax(-1)
        kept, index = log_probs.topk(min(_KEPT, logits.shape[-1]), -1, sorted=False)
        rest = log_probs.scatter(-1, index, -torch.inf).logsumexp(-1)
        return cls(index.int(), kept, rest)

    @classmethod
    def joined(cls, parts: list[TeacherRows]) -> TeacherRows:
        """All rows of several parts, in order."""
        return cls(
            torch.cat([part.index for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.rest for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.rest)


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of rows of logits from the teacher's; a `RowLoss`."""

    teacher: TeacherRows

    def __call__(self, logits: Tensor, rows: slice, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """The sum of `Σ p (log p − log q)` over the rows, p the teacher's outcomes; see `RowLoss`.

        The gradient by a logit is `q − p` for a stored token, and `q − p_rest · q / q_rest` for
        another.
        """
        index = self.teacher.index[rows].long()
        known = self.teacher.log_probs[rows].to(logits.dtype)
        rest = self.teacher.rest[rows].to(logits.dtype)[:, None]
        peak = logits.logsumexp(-1, keepdim=True)
        others = logits.scatter(-1, index, -torch.inf)
        peak_of_others = others.logsumexp(-1, keepdim=True)
        found = logits.gather(-1, index) - peak
        total = (known.exp() * (known - found)).sum()
        any_rest = rest.isfinite() & peak_of_others.isfinite()
        distance = torch.where(any_rest, rest - (peak_of_others - peak), 0.0)
        total = total + (rest.exp() * distance).sum()
        if not slope:
            return total, None
        share = torch.where(any_rest, rest - peak_of_others, 0.0)
        by_logit = (logits - peak).exp_()
        by_logit -= torch.where(any_rest, (others + share).exp_(), 0.0)
        return total, by_logit.scatter_add_(-1, index, -known.exp())

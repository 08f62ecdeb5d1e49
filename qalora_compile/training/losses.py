"""The loss of a batch, by `FitSpec.loss`, and that of held-out examples.

DPO and ORPO are losses of preferences: of two answers to one prompt, of which one is preferred.

log p(y) is the sum over the tokens of an answer y, and n(y) their number; c is the preferred
answer, r the rejected one, q the model with which training began.

DPO (arXiv 2305.18290, Eq. 7)    − log σ(β (log p(c) − log q(c) − log p(r) + log q(r)))
ORPO (arXiv 2403.07691, Eq. 6)   − log p(c) / n(c) − λ log σ(log odds(c) − log odds(r)),
                                 log odds(y) = a − log(1 − exp a), a = log p(y) / n(y)

The first term of ORPO is a mean over the tokens of all preferred answers of a step, as
cross-entropy is; TRL's is one over prompts and answers. All else are means over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qalora_compile.config.choices import DPO, ORPO
from qalora_compile.config.fit import FitSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.progress import track
from qalora_compile.training.data.example import Batch, Example, collate
from qalora_compile.training.evaluate import (
    Forward,
    Metrics,
    evaluate,
    label_loss,
    program_forward,
)
from qalora_compile.training.forward.training_forward import TrainingForward

_PAIRS = 8
"""Pairs of a batch in evaluation."""


class BatchLoss(nn.Module):
    """A module that computes the terms of a batch's loss; its parameters are the program's.

    Args:
        program: At stage `adapted`.
        spec: The loss, and how it is computed.
        reference: For DPO, the adapters of the reference model.
    """

    def __init__(
        self, program: Program, spec: FitSpec, reference: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.module = program.module
        self._program, self._spec, self._adapters = program, spec, reference
        self._training: TrainingForward | None = None  # created once the module is on its device
        self._reference: TrainingForward | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """The terms, scalars in nats: their sum is the loss of this batch alone.

        Each is a mean over what `counts_of` counts.
        """
        if self._training is None:
            self._training = self._forward_of(
                self._program,
                checkpointed=self._spec.gradient_checkpointing,
                noise=self._spec.neftune_alpha,
            )
        if not self._spec.learns_pairs:
            return (self._training.loss(batch),)
        reference = self._reference_log_probs(batch)
        return pair_terms(self._spec, self._training.log_probs(batch), batch, reference)

    def _reference_log_probs(self, batch: Batch) -> Tensor | None:
        """The log-probabilities of the answers by the model with which training began, for DPO."""
        if self._spec.loss != DPO:
            return None
        if self._reference is None:
            self._reference = self._forward_of(reference_program(self._program, self._adapters))
        with torch.no_grad():
            return self._reference.log_probs(batch)

    def _forward_of(
        self, program: Program, *, checkpointed: bool = False, noise: float = 0.0
    ) -> TrainingForward:
        return TrainingForward(
            program,
            fused=self._spec.precision == "float32",
            gradient_checkpointing=checkpointed,
            neftune_alpha=noise,
        )


def counts_of(batch: Batch, spec: FitSpec) -> tuple[int, ...]:
    """Over how many items each term of the loss is a mean: tokens that carry loss, or pairs."""
    if not spec.learns_pairs:
        return (int(batch.targets.sum()),)
    if spec.loss == ORPO:
        return batch.pairs, int(batch.targets[: batch.pairs].sum())
    return (batch.pairs,)


def held_out_metrics(
    program: Program,
    examples: Sequence[Example],
    spec: FitSpec,
    reference: Mapping[str, Tensor] | None,
) -> Metrics:
    """Figures on held-out examples; the loss is that of `spec`.

    Args:
        program: In evaluation mode.
        examples: At least one.
        spec: The loss.
        reference: For DPO, the adapters of the reference model.

    Raises:
        UserInputError: the examples hold nothing to predict.
    """
    if spec.learns_pairs:
        return evaluate_pairs(program, examples, spec, reference)
    return evaluate(program_forward(program), examples)


def reference_program(program: Program, adapters: Mapping[str, Tensor] | None) -> Program:
    """The program with other adapters, which are not trained; all other tensors are shared.

    Args:
        program: At stage `adapted`.
        adapters: By name.

    Raises:
        UserInputError: there are no adapters.
    """
    if adapters is None:
        raise UserInputError(
            "the state of the training has no adapters of a reference model",
            hint="begin with FitState.fresh(program, spec)",
        )
    own = program.tensors()
    fixed = {
        name: nn.Parameter(tensor.to(own[name].device), requires_grad=False)
        for name, tensor in adapters.items()
    }
    return program.evolve(graph=program.copy_graph(), tensors=own | fixed).eval()


def pair_terms(
    spec: FitSpec, log_probs: Tensor, batch: Batch, reference: Tensor | None
) -> tuple[Tensor, ...]:
    """The terms of the loss of a batch; scalars in nats, see `counts_of`.

    Args:
        spec: The loss, and its beta.
        log_probs: Of the answers, `[2 P]`: preferred, then rejected.
        batch: P pairs.
        reference: For DPO, those by the reference model.
    """
    margins = pair_margins(spec, log_probs, batch, reference)
    preference = -functional.logsigmoid(margins).mean()
    if spec.loss == DPO:
        return (preference,)
    counts = batch.targets[: batch.pairs].sum()
    return spec.beta * preference, -log_probs[: batch.pairs].sum() / counts


def pair_margins(
    spec: FitSpec, log_probs: Tensor, batch: Batch, reference: Tensor | None
) -> Tensor:
    """How much the model prefers the preferred answer of each pair, `[P]`: the argument of σ."""
    if reference is not None:
        chosen, rejected = (log_probs - reference).chunk(2)
        return spec.beta * (chosen - rejected)
    mean = log_probs / batch.targets
    chosen, rejected = (mean - _log_one_minus_exp(mean)).chunk(2)
    return chosen - rejected


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 − exp x) for x ≤ 0; x above −1e-7, which float32 cannot tell from 0, counts as that."""
    x = x.clamp(max=-1e-7)
    near = x > -math.log(2)
    safe = x.masked_fill(~near, -1.0)  # what is not taken must not overflow in the backward pass
    return torch.where(near, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(x)))


def evaluate_pairs(
    program: Program,
    examples: Sequence[Example],
    spec: FitSpec,
    adapters: Mapping[str, Tensor] | None,
) -> Metrics:
    """Evaluate on held-out pairs, in order, without gradients.

    `Metrics.loss` is the loss of `spec`, `token_accuracy` that of the preferred answers, and
    `exact_match` the share of pairs in which the model prefers the preferred answer (for DPO, more
    than the reference model does); a tie counts half.

    Args:
        program: In evaluation mode.
        examples: At least one pair.
        spec: The loss.
        adapters: For DPO, those of the reference model.
    """
    forward = program_forward(program)
    other = None
    if spec.loss == DPO:
        other = program_forward(reference_program(program, adapters))
    sums, totals = [0.0, 0.0], [0, 0]
    preferred, right, tokens = 0.0, 0, 0
    with torch.no_grad():
        for start in track(range(0, len(examples), _PAIRS), "evaluate"):
            batch = collate(examples[start : start + _PAIRS])
            log_probs, hits = _log_probs(forward, batch)
            reference = None if other is None else _log_probs(other, batch)[0]
            batch = batch.to(log_probs.device)
            counts = counts_of(batch, spec)
            for i, term in enumerate(pair_terms(spec, log_probs, batch, reference)):
                sums[i] += float(term) * counts[i]
                totals[i] += counts[i]
            margins = pair_margins(spec, log_probs, batch, reference)
            preferred += float((margins.sign() + 1).sum()) / 2
            right += sum(int(hit.sum()) for hit in hits[: batch.pairs])
            tokens += int(batch.targets[: batch.pairs].sum())
    return Metrics(
        loss=sum(value / total for value, total in zip(sums, totals, strict=True) if total),
        token_accuracy=right / tokens,
        exact_match=preferred / len(examples),
        choice_accuracy=None,
        examples=len(examples),
    )


def _log_probs(forward: Forward, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The log-probability of each answer, `[2 P]`, and which of its tokens are the likeliest."""
    logits = forward(batch.input_ids, batch.attention_mask, *batch.source)
    rows, targets = label_loss(logits, batch.to(logits.device))
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    losses = functional.cross_entropy(rows, targets, reduction="none")
    counts = batch.targets.tolist()
    found = torch.stack([-row.sum() for row in losses.split(counts)])
    return found, list((rows.argmax(-1) == targets).split(counts))

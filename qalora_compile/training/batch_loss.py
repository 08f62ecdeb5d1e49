"""The loss of a batch, by `FitSpec.loss`: the terms that training adds up, and held-out figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qalora_compile.config.choices import DPO
from qalora_compile.config.fit import FitSpec
from qalora_compile.ir.program import Program
from qalora_compile.training.data.example import Batch, Example
from qalora_compile.training.evaluate import Metrics, evaluate, program_forward
from qalora_compile.training.forward.training_forward import TrainingForward
from qalora_compile.training.preferences import evaluate_pairs, pair_terms, reference_program


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

        Each is a mean over what `preferences.counts_of` counts.
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

"""A plain AdamW loop over the adapters of a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qalora_compile.config import Spec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.training.data import Example, batch_at
from qalora_compile.training.forward import TrainingForward


@dataclass(frozen=True, kw_only=True)
class FitSpec(Spec):
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples a step.
        learning_rate: Peak rate of AdamW, reached after warm-up, then cosine down to zero.
        warmup: Part of the steps spent warming up.
        clip: Largest norm of the gradient.
        seed: Of the data order.
        gradient_checkpointing: Compute each layer again in the backward pass instead of keeping
            what it computed: less memory, about a third more time.
    """

    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserInputError(
                    f"{name} is {getattr(self, name)}", hint=f"use {least} or more"
                )
        if not 0 < self.learning_rate < math.inf:
            raise UserInputError(f"learning_rate is {self.learning_rate}", hint="use e.g. 1e-3")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepReport:
    """What one step did: its number from 1, mean loss in nats, rate, gradient norm, tokens."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int


@dataclass(frozen=True)
class FitResult:
    """Losses of all steps run, and whether training was stopped early by the caller."""

    losses: tuple[float, ...]
    stopped: bool


OnStep = Callable[[StepReport, torch.optim.Optimizer], bool]
"""Called after each step; True stops training."""


def make_optimizer(program: Program, spec: FitSpec) -> torch.optim.AdamW:
    """AdamW without weight decay over the adapter parameters."""
    return torch.optim.AdamW(
        program.adapter_parameters(), lr=spec.learning_rate, weight_decay=0.0, foreach=True
    )


def fit(
    program: Program,
    examples: Sequence[Example],
    spec: FitSpec,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start_step: int = 0,
    on_step: OnStep | None = None,
) -> FitResult:
    """Train the adapters in place; the program ends in evaluation mode.

    Args:
        program: At stage `adapted`; a language model, with an encoder or without.
        examples: At least one.
        spec: Steps, batch size, rate, seed.
        optimizer: For resuming; None makes one (`make_optimizer`).
        start_step: Steps already done.
        on_step: Called after every step.

    Raises:
        PreconditionError: the program has no adapters.
        UserInputError: there is no example, or the loss is not finite (the step is named; the
            parameters are still those of the step before).
    """
    forward = TrainingForward(program, gradient_checkpointing=spec.gradient_checkpointing)
    if not examples:
        raise UserInputError("there is no example to train on")
    optimizer = optimizer or make_optimizer(program, spec)
    losses: list[float] = []
    program.train()
    try:
        for step in range(start_step, spec.steps):
            report = _step(forward, examples, spec, optimizer, step)
            losses.append(report.loss)
            if on_step is not None and on_step(report, optimizer):
                return FitResult(tuple(losses), stopped=True)
    finally:
        program.eval()
    return FitResult(tuple(losses), stopped=False)


def _step(
    forward: TrainingForward,
    examples: Sequence[Example],
    spec: FitSpec,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> StepReport:
    batch = batch_at(examples, step, batch_size=spec.batch_size, seed=spec.seed)
    loss = forward.loss(batch)
    value = loss.item()
    if not math.isfinite(value):
        raise UserInputError(
            f"the loss is {value} at step {step + 1}",
            hint="lower the learning rate, or look for broken examples",
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(forward.program.adapter_parameters(), spec.clip)
    rate = spec.rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return StepReport(step + 1, value, rate, norm.item(), int(batch.attention_mask.sum()))

"""A plain AdamW loop over the adapters of a program, alone or as one of several processes."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.program import ADAPTED, Program
from qalora_compile.training.batches import Batches, batch_at
from qalora_compile.training.evaluate import evaluate, program_forward
from qalora_compile.training.examples import Batch, Example
from qalora_compile.training.forward import TrainingForward
from qalora_compile.training.optimizer import clip_gradients, make_optimizer, set_rates
from qalora_compile.training.precision import computing
from qalora_compile.training.processes import Processes
from qalora_compile.training.spec import FitSpec


@dataclass(frozen=True)
class Best:
    """The least held-out loss so far, the step after which it was, and the adapters of then."""

    loss: float
    step: int
    adapters: dict[str, Tensor]


@dataclass
class FitState:
    """Where a training stands: all that a checkpoint holds beside the adapters.

    There is no state of a random generator: the order of the data and what dropout drops are drawn
    for each micro-batch from the seed and its number.

    Attributes:
        optimizer: With its moments.
        step: Steps done; the data position and the schedule follow from it.
        best: None until something was evaluated with `FitSpec.patience`.
        stale: Evaluations since then.
    """

    optimizer: torch.optim.Optimizer
    step: int = 0
    best: Best | None = None
    stale: int = 0

    @classmethod
    def fresh(cls, program: Program, spec: FitSpec) -> FitState:
        """The state before the first step."""
        return cls(make_optimizer(program, spec))

    def is_over(self, spec: FitSpec) -> bool:
        """Whether all steps are done, or the held-out loss has stopped to fall."""
        return self.step >= spec.steps or bool(spec.patience and self.stale >= spec.patience)


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: Its number, from 1.
        loss: Mean in nats over the tokens that carry loss, of all micro-batches and processes.
        learning_rate: Of A.
        grad_norm: Before clipping.
        tokens: Read, padding not counted, by all processes.
        seconds: That the step took, evaluation not counted.
        held_out: Loss on held-out examples, where they were evaluated after it.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    held_out: float | None = None


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Attributes:
        losses: Of all steps run, resumed ones not counted.
        stopped: Whether the caller stopped it.
        step: Steps done in all.
        kept: Of which step the adapters are: another than `step` where the least held-out loss
            was before it and `FitSpec.patience` is set.
    """

    losses: tuple[float, ...]
    stopped: bool
    step: int
    kept: int


OnStep = Callable[[StepReport, FitState], bool]
"""Called after each step, in every process; True stops training."""


def fit(
    program: Program,
    examples: Sequence[Example] | Batches,
    spec: FitSpec,
    *,
    state: FitState | None = None,
    held_out: Sequence[Example] = (),
    on_step: OnStep | None = None,
    processes: Processes | None = None,
) -> FitResult:
    """Train the adapters in place; the program ends in evaluation mode.

    Args:
        program: At stage `adapted`; a language model, with an encoder or without.
        examples: At least one; or `Batches` of them, of the batch size and seed of `spec`, which
            may be arranged by length or packed.
        spec: Steps, batch size, rate, seed.
        state: For resuming; None starts anew. It is brought forward in place.
        held_out: Examples for `spec.evaluate_every`.
        on_step: Called after every step.
        processes: Those that train together (`find_processes`); None trains in this one alone.
            Each reads other micro-batches, and all see the same losses.

    Raises:
        PreconditionError: the program has no adapters.
        UserInputError: there is no example, none to evaluate on, or a loss or gradient is not
            finite (the step is named; the adapters are still those of the step before).
        UnsupportedError: the device does not compute in `spec.precision`.
    """
    if program.stage != ADAPTED:
        raise PreconditionError(
            f"training takes a program at stage {ADAPTED}, this one is {program.stage}",
            hint="insert adapters first: qc.insert_adapters(program, qc.AdapterSpec())",
        )
    if not examples:
        raise UserInputError("there is no example to train on")
    if spec.evaluate_every and not held_out:
        raise UserInputError(
            f"evaluate_every is {spec.evaluate_every}, and there is nothing to evaluate on",
            hint="give held-out examples",
        )
    state = state or FitState.fresh(program, spec)
    processes = processes or Processes()
    training = _Training(program, examples, spec, state, held_out, processes)
    losses: list[float] = []
    program.train()
    try:
        with torch.random.fork_rng():
            while not state.is_over(spec):
                report = training.step()
                losses.append(report.loss)
                stop = on_step is not None and on_step(report, state)
                if processes.sum(float(stop)):  # an interrupt may reach one process sooner
                    return FitResult(tuple(losses), True, state.step, state.step)
    finally:
        program.eval()
    if state.best is not None:
        _put(program, state.best.adapters)
    kept = state.best.step if state.best is not None else state.step
    return FitResult(tuple(losses), False, state.step, kept)


class BatchLoss(nn.Module):
    """The mean loss of a batch as a module, whose parameters are the program's."""

    def __init__(self, program: Program, spec: FitSpec) -> None:
        super().__init__()
        self.module = program.module
        self._program, self._spec = program, spec
        self._training: TrainingForward | None = None  # made once the module is on its device

    def forward(self, batch: Batch) -> Tensor:
        """A scalar, in nats."""
        if self._training is None:
            self._training = TrainingForward(
                self._program,
                fused=self._spec.precision == "float32",
                gradient_checkpointing=self._spec.gradient_checkpointing,
            )
        return self._training.loss(batch)


@dataclass
class _Training:
    """The parts of one training, and its steps."""

    program: Program
    examples: Sequence[Example] | Batches
    spec: FitSpec
    state: FitState
    held_out: Sequence[Example]
    processes: Processes
    wrapped: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = self.processes.wrap(BatchLoss(self.program, self.spec))
        self.parameters = self.program.adapter_parameters()
        self.device = self.parameters[0].device

    def step(self) -> StepReport:
        """One optimizer step, and the evaluation that is due after it."""
        started = time.monotonic()
        spec, state, number = self.spec, self.state, self.state.step
        batches = [self._batch(number, i) for i in range(spec.accumulate)]
        targets = self.processes.sum(sum(int(batch.targets.sum()) for _, batch in batches))
        tokens = self.processes.sum(sum(b.tokens for _, b in batches))
        if not targets:
            raise UserInputError(f"the examples of step {number + 1} hold nothing to learn")
        state.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for index, batch in batches:
            last = index == batches[-1][0]
            with nullcontext() if last else self.processes.apart(self.wrapped):
                loss += self._backward(index, batch, targets)
        loss = self.processes.sum(loss)
        norm = clip_gradients(self.parameters, spec)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserInputError(
                f"at step {number + 1} the loss is {loss} and the norm of its gradient {norm}",
                hint="lower the learning rate, or look for broken examples",
            )
        rate = set_rates(state.optimizer, spec, number)
        state.optimizer.step()
        state.step += 1
        seconds = time.monotonic() - started
        held_out = self._evaluate()
        return StepReport(state.step, loss, rate, norm, int(tokens), seconds, held_out)

    def _batch(self, step: int, part: int) -> tuple[int, Batch]:
        """The number of a micro-batch of this process, and the micro-batch."""
        spec, processes = self.spec, self.processes
        index = (step * spec.accumulate + part) * processes.count + processes.rank
        batch = batch_at(self.examples, index, batch_size=spec.batch_size, seed=spec.seed)
        return index, batch

    def _backward(self, index: int, batch: Batch, targets: float) -> float:
        """Add the gradient of a micro-batch's part of the loss; returns that part."""
        if not int(batch.targets.sum()) and self.processes.count == 1:
            return 0.0  # a mean over nothing; with several processes, all have to go backward
        torch.manual_seed(seed_of(self.spec.seed, index))
        with computing(self.spec, self.device):
            mean: Tensor = self.wrapped(batch.to(self.device))
        part = mean * (int(batch.targets.sum()) / targets)
        (part * self.processes.count).backward()  # type: ignore[no-untyped-call]
        return part.item()

    def _evaluate(self) -> float | None:
        """Held-out loss where it is due; notes whether it is the least."""
        spec, state = self.spec, self.state
        due = spec.evaluate_every and (
            state.step % spec.evaluate_every == 0 or state.step == spec.steps
        )
        if not due:
            return None
        self.program.eval()
        with computing(spec, self.device):
            own = evaluate(program_forward(self.program), self.held_out).loss
        self.program.train()
        loss = self.processes.sum(own) / self.processes.count  # one number for all to decide by
        if not spec.patience:
            return loss
        if state.best is None or loss < state.best.loss:
            state.best, state.stale = Best(loss, state.step, adapters_of(self.program)), 0
        else:
            state.stale += 1
        return loss


def seed_of(seed: int, index: int) -> int:
    """What the random numbers of a micro-batch are drawn from; 32 bits, all that torch uses."""
    return zlib.crc32(f"{seed} {index}".encode())


def adapters_of(program: Program) -> dict[str, Tensor]:
    """Copies of the adapters, by name."""
    return {name: p.detach().clone() for name, p in program.named_adapter_parameters()}


def _put(program: Program, adapters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in program.named_adapter_parameters():
            parameter.copy_(adapters[name])

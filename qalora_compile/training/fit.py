"""A plain AdamW loop over the adapters of a program, in one or several processes."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qalora_compile.config.choices import DPO
from qalora_compile.config.fit import FitSpec
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTED
from qalora_compile.training.data.batches import Batches, batch_at
from qalora_compile.training.data.example import Batch, Example
from qalora_compile.training.data.media_examples import unit_of
from qalora_compile.training.distributed import Processes
from qalora_compile.training.forward.adaptive_rank import RankAllocator
from qalora_compile.training.forward.align_tensors import align_tensors
from qalora_compile.training.forward.autocast import computing
from qalora_compile.training.losses import BatchLoss, counts_of, held_out_metrics
from qalora_compile.training.optimizer import clip_gradients, make_optimizer, set_rates

_HINT = "lower the learning rate, or look for broken examples"


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far, its step, and the adapters after that step."""

    loss: float
    step: int
    adapters: dict[str, Tensor]


@dataclass
class FitState:
    """The state of a training: all that a checkpoint holds in addition to the adapters.

    It needs no state of a random generator: the order of the data, and the dropout masks and noise
    of each micro-batch, are drawn from the seed and the number of the micro-batch.

    Attributes:
        optimizer: The optimizer with its moments.
        step: Number of steps done; it determines the data position and the schedule.
        best: None until an evaluation with `FitSpec.patience`.
        stale: Number of evaluations since the best one.
        reference: For DPO, the adapters with which training began: the reference model has them.
        ranks: With `FitSpec.adaptive_rank`, which ranks are in use, and what they are chosen by.
    """

    optimizer: torch.optim.Optimizer
    step: int = 0
    best: Best | None = None
    stale: int = 0
    reference: dict[str, Tensor] | None = None
    ranks: RankAllocator | None = None

    @classmethod
    def fresh(cls, program: Program, spec: FitSpec) -> FitState:
        """The state before the first step."""
        reference = adapters_of(program) if spec.loss == DPO else None
        ranks = None
        if spec.adaptive_rank is not None:
            named = program.named_adapter_parameters()
            ranks = RankAllocator(named, spec.adaptive_rank, spec.steps)
        return cls(make_optimizer(program, spec), reference=reference, ranks=ranks)

    def is_over(self, spec: FitSpec) -> bool:
        """Whether all steps are done, or the held-out loss has stopped falling."""
        return self.step >= spec.steps or bool(spec.patience and self.stale >= spec.patience)


@dataclass(frozen=True)
class StepReport:
    """The results of one step.

    Attributes:
        step: Its number, from 1.
        loss: Mean in nats over the tokens that carry loss, or over the pairs of answers, of all
            micro-batches and processes.
        learning_rate: Learning rate of A.
        grad_norm: Norm of the gradient before clipping.
        tokens: Number of tokens that all processes read, without padding.
        seconds: Duration of the step, without evaluation.
        held_out: Loss on held-out examples, if they were evaluated after the step.
        held_out_accuracy: `Metrics.exact_match` of the held-out examples; of pairs, the share in
            which the model prefers the preferred answer.
        unit: What `tokens` counts: `tokens`, or `examples` for images and recordings.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    held_out: float | None = None
    held_out_accuracy: float | None = None
    unit: str = "tokens"


@dataclass(frozen=True)
class FitResult:
    """The result of a training.

    Attributes:
        losses: Losses of all steps of this run, without those before it was resumed.
        stopped: Whether the caller stopped it.
        step: Total number of steps done.
        kept: The step of the adapters. It differs from `step` if `FitSpec.patience` is set and the
            held-out loss was lowest at an earlier step.
    """

    losses: tuple[float, ...]
    stopped: bool
    step: int
    kept: int


OnStep = Callable[[StepReport, FitState], bool]
"""Called after each step, in every process; True stops training."""

OnGood = Callable[[FitState, bool], None]
"""Called in every process once a loss and a gradient, computed with the weights of a step, are
finite: in the next step, before it changes them, or after the last step (then with True).

A step may make the weights diverge, which its own loss, computed before the update, does not show.
Checkpoints that are saved here can always be continued.
"""


def fit(
    program: Program,
    examples: Sequence[Example] | Batches,
    spec: FitSpec,
    *,
    state: FitState | None = None,
    held_out: Sequence[Example] = (),
    on_step: OnStep | None = None,
    on_good: OnGood | None = None,
    processes: Processes | None = None,
) -> FitResult:
    """Train the adapters in place; the program is in evaluation mode afterwards.

    Args:
        program: A language model, with or without an encoder, or a classifier, at stage `adapted`.
        examples: At least one example, which is a pair of answers if `spec.loss` is one of pairs;
            or `Batches`, with the batch size and seed of `spec`, which may be arranged by length or
            packed.
        spec: Steps, batch size, learning rate, seed.
        state: The state to resume from, updated in place; None starts from the beginning.
        held_out: Examples for `spec.evaluate_every`.
        on_step: Called after every step.
        on_good: Called when the weights of a step have given a finite loss: the place to save them.
        processes: The processes that train together (`find_processes`); None: only this one. Each
            reads different micro-batches, and all receive the same losses.

    Raises:
        PreconditionError: the program has no adapters.
        UserInputError: there is no example, there is none for evaluation, or they do not suit the
            loss; or a training loss, held-out loss or gradient is not finite (the step is named,
            and the adapters are those with which it was computed).
        UnsupportedError: the device does not compute in `spec.precision`.
    """
    _check_trainable(program, examples, spec, held_out)
    align_tensors(program)
    state = state or FitState.fresh(program, spec)
    processes = processes or Processes()
    training = _Training(program, examples, spec, state, held_out, processes, on_good)
    losses: list[float] = []
    stopped = False
    program.train()
    try:
        with torch.random.fork_rng():
            while not (stopped or state.is_over(spec)):
                report = training.step()
                losses.append(report.loss)
                stop = on_step is not None and on_step(report, state)
                stopped = processes.sum(float(stop)) > 0  # processes may stop at different times
            if losses:
                training.prove_last()
    finally:
        program.eval()
    if stopped or state.best is None:
        return FitResult(tuple(losses), stopped, state.step, state.step)
    _put(program, state.best.adapters)
    return FitResult(tuple(losses), False, state.step, state.best.step)


def _check_trainable(
    program: Program,
    examples: Sequence[Example] | Batches,
    spec: FitSpec,
    held_out: Sequence[Example],
) -> None:
    if program.stage != ADAPTED:
        raise PreconditionError(
            f"training takes a program at stage {ADAPTED}, and this one is {program.stage}",
            hint="insert adapters first: qc.insert_adapters(program, qc.AdapterSpec())",
        )
    if not examples:
        raise UserInputError("there are no examples to train on")
    if spec.evaluate_every and not held_out:
        raise UserInputError(
            f"evaluate_every is {spec.evaluate_every}, and there are no held-out examples",
            hint="give held-out examples, or set evaluate_every to 0",
        )
    for given in (examples.examples if isinstance(examples, Batches) else examples, held_out):
        if given and (given[0].rejected is not None) != spec.learns_pairs:
            kind = "no pairs of answers" if spec.learns_pairs else "pairs of answers"
            raise UserInputError(
                f"the loss is {spec.loss}, and the examples are {kind}",
                hint="pairs are read by load_examples(…, pairs=True), and learned by dpo and orpo",
            )


@dataclass
class _Training:
    """One training: its parts and its steps."""

    program: Program
    examples: Sequence[Example] | Batches
    spec: FitSpec
    state: FitState
    held_out: Sequence[Example]
    processes: Processes
    on_good: OnGood | None
    wrapped: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.state.step
        given = self.examples
        self.unit = unit_of(given.examples if isinstance(given, Batches) else given)
        loss = BatchLoss(self.program, self.spec, self.state.reference)
        self.wrapped = self.processes.wrap(loss)
        self.parameters = self.program.adapter_parameters()
        self.device = self.parameters[0].device
        for moments in self.state.optimizer.state.values():  # a resumed run reads them to the CPU
            moments.update({k: t.to(self.device) for k, t in moments.items() if t.dim()})

    def step(self) -> StepReport:
        """One optimizer step, and the evaluation that may be due after it."""
        started = time.monotonic()
        spec, state, number = self.spec, self.state, self.state.step
        loss, norm, tokens = self._gradients(number, f"at step {number + 1}")
        saving = time.monotonic()
        if number > self.begun:  # the first weights are already saved, or untrained
            self._note_good(last=False)
        started += time.monotonic() - saving
        rate = set_rates(state.optimizer, spec, number)
        state.optimizer.step()
        state.step += 1
        if state.ranks is not None:
            state.ranks.step(state.step)
        seconds = time.monotonic() - started
        figures = state.step, loss, rate, norm, tokens, seconds, *self._evaluate()
        return StepReport(*figures, unit=self.unit)

    def prove_last(self) -> None:
        """Check that the last weights give a finite loss and gradient on the data of their step."""
        step = self.state.step
        self._gradients(step - 1, f"after step {step}")
        self.state.optimizer.zero_grad(set_to_none=True)
        self._note_good(last=True)

    def _note_good(self, *, last: bool) -> None:
        if self.on_good is not None:
            self.on_good(self.state, last)

    def _gradients(self, number: int, when: str) -> tuple[float, float, int]:
        """Loss, gradient norm and tokens of a step; the clipped gradient is left in place."""
        batches = [self._batch(number, i) for i in range(self.spec.accumulate)]
        counts = zip(*(counts_of(batch, self.spec) for _, batch in batches), strict=True)
        totals = [self.processes.sum(sum(each)) for each in counts]
        tokens = self.processes.sum(sum(b.tokens for _, b in batches))
        if not totals[0]:
            raise UserInputError(f"the examples of step {number + 1} hold nothing to learn")
        self.state.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for index, batch in batches:
            last = index == batches[-1][0]
            with nullcontext() if last else self.processes.apart(self.wrapped):
                loss += self._backward(index, batch, totals)
        loss = self.processes.sum(loss)
        norm = clip_gradients(self.parameters, self.spec)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserInputError(
                f"{when} the loss is {loss} and the norm of its gradient {norm}", hint=_HINT
            )
        return loss, norm, int(tokens)

    def _batch(self, step: int, part: int) -> tuple[int, Batch]:
        """The number of a micro-batch of this process, and the micro-batch."""
        spec, processes = self.spec, self.processes
        index = (step * spec.accumulate + part) * processes.count + processes.rank
        batch = batch_at(self.examples, index, batch_size=spec.batch_size, seed=spec.seed)
        return index, batch

    def _backward(self, index: int, batch: Batch, totals: Sequence[float]) -> float:
        """Add the gradient of a micro-batch's part of the loss; returns that part."""
        own = counts_of(batch, self.spec)
        if not own[0]:
            if self.processes.count == 1:
                return 0.0  # no targets
            batch = _any_targets(batch)  # all processes must run backward; its weight is 0
        torch.manual_seed(seed_of(self.spec.seed, index))
        with computing(self.spec, self.device):
            means: tuple[Tensor, ...] = self.wrapped(batch.to(self.device))
        first, *others = (
            mean * (count / total) for mean, count, total in zip(means, own, totals, strict=True)
        )
        part = sum(others, first)
        (part * self.processes.count).backward()  # type: ignore[no-untyped-call]
        return part.item()

    def _evaluate(self) -> tuple[float | None, float | None]:
        """Held-out loss and accuracy, if they are due; records whether the loss is the lowest."""
        spec, state, processes = self.spec, self.state, self.processes
        due = spec.evaluate_every and (
            state.step % spec.evaluate_every == 0 or state.step == spec.steps
        )
        if not due:
            return None, None
        self.program.eval()
        with computing(spec, self.device):
            own = held_out_metrics(self.program, self.held_out, spec, state.reference)
        self.program.train()
        # All processes decide by the same number.
        loss, right = (processes.sum(v) / processes.count for v in (own.loss, own.exact_match))
        if not math.isfinite(loss):
            raise UserInputError(f"after step {state.step} the held-out loss is {loss}", hint=_HINT)
        if not spec.patience:
            return loss, right
        if state.best is None or loss < state.best.loss:
            state.best, state.stale = Best(loss, state.step, adapters_of(self.program)), 0
        else:
            state.stale += 1
        return loss, right


def _any_targets(batch: Batch) -> Batch:
    """Give targets to a batch that has none."""
    short = max(0, 2 - batch.input_ids.shape[1])  # the first token has no context
    ids, mask = (functional.pad(t, (0, short)) for t in (batch.input_ids, batch.attention_mask))
    return replace(batch, input_ids=ids, attention_mask=mask, labels=ids)


def seed_of(seed: int, index: int) -> int:
    """The seed of a micro-batch's random numbers; 32 bits, which is all that torch uses."""
    return zlib.crc32(f"{seed} {index}".encode())


def adapters_of(program: Program) -> dict[str, Tensor]:
    """Copies of the adapters, by name."""
    return {name: p.detach().clone() for name, p in program.named_adapter_parameters()}


def _put(program: Program, adapters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in program.named_adapter_parameters():
            parameter.copy_(adapters[name])

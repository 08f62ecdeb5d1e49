"""Train the scales and offsets of all layers together; codes stay.

The loss is the divergence of the model's predictions from the float model's. Methods that look at
one layer at a time cannot see it: an error that later layers would amplify costs them no more than
one that later layers ignore (EfficientQAT, arXiv 2407.11062, trains scales end to end on labels).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qalora_compile.config import QuantSpec
from qalora_compile.config.fit import FitSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.progress import announce, say
from qalora_compile.training.fit import Best, FitState, adapters_of
from qalora_compile.training.forward.chunked_loss import split_head, summed_loss
from qalora_compile.training.learned.divergence import Divergence
from qalora_compile.training.learned.lessons import Lesson, Lessons, kept_rows, read_lessons
from qalora_compile.training.optimizer import clip_gradients, set_rates
from qalora_compile.training.records.checkpoint import (
    list_checkpoints,
    remove_unfinished,
    restore_checkpoint,
    save_checkpoint,
)
from qalora_compile.training.records.run_identity import Identity, tensor_digest

_ROWS = 1024
"""Tokens of a step, at least."""
_EVALUATE_EVERY = 8
_PATIENCE = 3
_BETAS = (0.9, 0.95)
"""A few dozen steps are too short for the usual 0.999."""
_HINT = "lower learn_rate, quantize to more bits, or look for broken calibration texts"


def learn_parameters(
    source: Program,
    quantized: Program,
    spec: QuantSpec,
    calls: Sequence[Call],
    *,
    keep: Collection[str] = (),
    checkpoints: Path | None = None,
) -> Program:
    """Train scales and offsets until the held-out divergence stops falling.

    In memory are the float program, the codes, four numbers for each scale and offset, about 2 KB
    for each calibration token, and the activations of 512 tokens, or of one text if it is longer.

    Args:
        source: The float program.
        quantized: The same program, quantized; it stays unchanged.
        spec: Steps and rate.
        calls: Calibration calls.
        keep: Paths of layers whose scales and offsets stay.
        checkpoints: Folder for checkpoints, from the last of which a killed training goes on; None
            writes none.

    Returns:
        A program that differs from `quantized` in the values of scales and offsets alone.

    Raises:
        UserInputError: there are too few calls, one does not fit, or a loss is not finite.
        UnsupportedError: the model gives no logits, or no layer can be trained.
    """
    student, units = _student(quantized, keep)
    fit = FitSpec(
        steps=spec.learn_steps,
        learning_rate=spec.learn_rate,
        evaluate_every=_EVALUATE_EVERY,
        patience=_PATIENCE,
    )
    work = None
    if checkpoints is not None:
        data = hashlib.sha256("".join(map(_digest_of, calls)).encode()).hexdigest()
        work = _Work.of(checkpoints, Identity.of(student, fit, data=data))
    lessons = read_lessons(source, calls, None if work is None else work.folder)
    learning = _Learning(student, units, fit, lessons, work)
    with torch.random.fork_rng(), torch.enable_grad():
        learning.run()
    return _with_parameters(quantized, learning.best)


def _student(quantized: Program, keep: Collection[str]) -> tuple[Program, dict[str, float]]:
    """A copy whose scales and offsets train, and the mean scale of each weight by path.

    Raises:
        UnsupportedError: there is nothing to train.
    """
    tensors, units = quantized.tensors(), {}
    for node in quantized.graph.find_nodes(op="call_function", target=GroupLinear.target):
        path = str(GroupLinear.of(node).scale.target).rpartition(".")[0]
        if path not in keep:
            units[path] = float(tensors[f"{path}.scale"].abs().mean())
    if not units:
        raise UnsupportedError(
            "no quantized layer can be trained: all are experts, or keep their codes",
            hint="use the method gptq",
        )
    names = [f"{path}.{part}" for path in units for part in ("scale", "offset")]
    trained = {name: nn.Parameter(tensors[name].detach().clone()) for name in names}
    return (
        quantized.evolve(
            graph=quantized.copy_graph(), tensors=tensors | trained, trained=tuple(names)
        ),
        units,
    )


def _with_parameters(quantized: Program, trained: dict[str, Tensor]) -> Program:
    """The program with other scales and offsets, as frozen as before."""
    new = quantized.tensors()
    for name, value in trained.items():
        is_parameter = isinstance(new[name], nn.Parameter)
        new[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return quantized.evolve(graph=quantized.copy_graph(), tensors=new)


@dataclass(frozen=True)
class _Work:
    """The folder of one training: the teacher's predictions, and the last checkpoint."""

    folder: Path
    identity: Identity

    @classmethod
    def of(cls, parent: Path, identity: Identity) -> _Work:
        """Named by the identity, so that work of other data or options is not taken up."""
        key = hashlib.sha256(repr(identity.to_json()).encode()).hexdigest()[:16]
        return cls(parent / key, identity)

    def restore(self, student: Program, state: FitState) -> bool:
        """Restore the last checkpoint; whether there is one."""
        remove_unfinished(self.folder)
        found = list_checkpoints(self.folder)
        if found:
            restore_checkpoint(found[-1], student, state, self.identity)
        return bool(found)

    def save(self, student: Program, state: FitState) -> None:
        """Write a checkpoint in the place of the last one."""
        save_checkpoint(self.folder, student, state, self.identity, keep=1)


@dataclass
class _Learning:
    """One training: its parts and its steps."""

    student: Program
    units: dict[str, float]
    fit: FitSpec
    lessons: Lessons
    work: _Work | None
    state: FitState = field(init=False)

    def __post_init__(self) -> None:
        self.student.eval()
        self._parameters = dict(self.student.named_adapter_parameters())
        self._body, self._head = split_head(self.student.module)
        groups = [
            {
                "params": [self._parameters[f"{path}.{part}"] for part in ("scale", "offset")],
                "lr": self.fit.learning_rate * unit,
            }
            for path, unit in self.units.items()
        ]
        self.state = FitState(torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0))
        if self.work is not None and self.work.restore(self.student, self.state):
            say(f"learn: goes on after step {self.state.step} of {self.fit.steps}")

    @property
    def best(self) -> dict[str, Tensor]:
        """The scales and offsets with the least held-out divergence."""
        assert self.state.best is not None, "the first evaluation is before the first step"
        return self.state.best.adapters

    def run(self) -> None:
        """Train, evaluate and save until the end."""
        steps, state = self.lessons.steps(self.fit.steps, _ROWS), self.state
        if state.best is None:
            self._evaluate()
        first = self.state.best
        announce("learn", state.step, self.fit.steps)
        while not state.is_over(self.fit):
            self._step(steps[state.step])
            if state.step % self.fit.evaluate_every == 0 or state.step == self.fit.steps:
                self._evaluate()
                if self.work is not None:
                    self.work.save(self.student, state)
            announce("learn", state.step, self.fit.steps)
        assert first is not None and state.best is not None, "evaluated above"
        say(
            f"learn: {state.best.loss:.4f} nats a token from the float model on held-out texts, "
            f"after step {state.best.step} of {state.step}"
        )

    def _step(self, lessons: list[Lesson]) -> None:
        state, rows = self.state, sum(len(lesson.teacher) for lesson in lessons)
        state.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for lesson in lessons:
            part = self._divergence(lesson) / rows
            part.backward()
            loss += float(part.detach())
        norm = clip_gradients(self._parameters.values(), self.fit)
        self._check(f"at step {state.step + 1}", loss, norm)
        set_rates(state.optimizer, self.fit, state.step)
        state.optimizer.step()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if name.endswith(".scale"):
                    parameter.clamp_(min=0)
        state.step += 1

    def _divergence(self, lesson: Lesson) -> Tensor:
        """The summed divergence of a lesson, a scalar in nats."""
        rows = kept_rows(self._body(*lesson.leaves), lesson.keep)
        return summed_loss(rows, Divergence(lesson.teacher), self._head)

    def _evaluate(self) -> None:
        """Measure the mean divergence of the held-out lessons, and keep the best parameters."""
        held_out, state = self.lessons.held_out, self.state
        with torch.no_grad():
            total = sum(float(self._divergence(lesson)) for lesson in held_out)
        loss = total / sum(len(lesson.teacher) for lesson in held_out)
        self._check(f"after step {state.step}", loss, 0.0)
        say(f"learn: step {state.step}, {loss:.4f} nats a token from the float model")
        if state.best is None or loss < state.best.loss:
            state.best, state.stale = Best(loss, state.step, adapters_of(self.student)), 0
        else:
            state.stale += 1

    def _check(self, when: str, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserInputError(
                f"learned: {when} the divergence is {loss} and the norm of its gradient {norm}",
                hint=_HINT,
            )


def _digest_of(call: Call) -> str:
    """Digest of the arguments of a call."""
    values = call.items() if isinstance(call, dict) else enumerate(call)
    parts = [(name, tensor_digest(v) if isinstance(v, Tensor) else v) for name, v in values]
    return hashlib.sha256(repr(parts).encode()).hexdigest()

"""Calibration calls as lessons: small parts with the teacher's predictions, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.progress import track
from qalora_compile.quantizers.calibrate import check_calls, real_rows
from qalora_compile.training.forward.chunked_loss import Head, split_head
from qalora_compile.training.learned.divergence import TeacherRows
from qalora_compile.training.learned.stored_teacher import read_teacher, write_teacher

LEAST_LESSONS = 8
"""Fewer cannot be divided into texts to learn from and texts that are held out."""
_PART_ROWS = 512
"""About so many tokens are computed at once, so memory does not grow with the calls."""
_LOGITS = 1 << 23
"""About so many logits of the teacher are held at once."""
_HELD_OUT = 8
"""One of so many lessons is held out, up to `_MOST_HELD_OUT` tokens."""
_MOST_HELD_OUT = 2048
_HINT = (
    "give more or longer texts: calibration=[…] of quantize_groups, or --calibration and "
    "--calibration-samples of finetune and quantize"
)


@dataclass(frozen=True)
class Lesson:
    """A part of a call with what the teacher predicts.

    Attributes:
        leaves: Flat inputs.
        keep: Which positions are not padding, boolean; None keeps all.
        teacher: One row for every position that is kept.
    """

    leaves: list[Any]
    keep: Tensor | None
    teacher: TeacherRows


@dataclass(frozen=True)
class Lessons:
    """The lessons to learn from, and those held out."""

    taught: list[Lesson]
    held_out: list[Lesson]

    def steps(self, count: int, rows: int) -> list[list[Lesson]]:
        """The lessons of each step: shuffled anew in every round, at least `rows` tokens a step."""
        generator = torch.Generator().manual_seed(0)
        found: list[list[Lesson]] = []
        order: list[int] = []
        for _ in range(count):
            step: list[Lesson] = []
            while sum(len(lesson.teacher) for lesson in step) < rows:
                order = order or torch.randperm(len(self.taught), generator=generator).tolist()
                step.append(self.taught[order.pop()])
            found.append(step)
        return found


def read_lessons(source: Program, calls: Sequence[Call], stored: Path | None = None) -> Lessons:
    """Run the float model once on all calls.

    Args:
        source: The float program, the teacher.
        calls: As for `quantize_groups`.
        stored: Folder that keeps the predictions, or holds them already.

    Raises:
        UserInputError: the calls are too few, one does not fit, or a prediction is not finite.
        UnsupportedError: the model gives no logits.
    """
    parts = _parts(source, calls)
    keeps = [_logits_mask(source, leaves) for leaves in parts]
    teacher = None if stored is None else read_teacher(stored)
    if teacher is None:
        teacher = _predictions(source, parts, keeps)
        if stored is not None:
            write_teacher(stored, teacher)
    lessons = [Lesson(*each) for each in zip(parts, keeps, teacher, strict=True)]
    return _divided([lesson for lesson in lessons if len(lesson.teacher)])


def check_texts(source: Program, calls: Sequence[Call]) -> None:
    """Check a float program and calls before they are used.

    Raises:
        UserInputError: the calls are too few, or one does not fit.
        UnsupportedError: the model gives no logits.
    """
    try:
        split_head(source.module)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"the method learned trains on predictions, and {error.what}", hint="use method gptq"
        ) from error
    parts = _parts(source, calls)
    if len(parts) < LEAST_LESSONS:
        raise _too_few(len(parts))


def _parts(source: Program, calls: Sequence[Call]) -> list[list[Any]]:
    return [part for leaves in check_calls(source, calls) for part in split_rows(source, leaves)]


def split_rows(program: Program, leaves: list[Any]) -> list[list[Any]]:
    """The inputs in parts of few tokens, if all of them have one dynamic axis for the texts."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    named = {leaf.shape[:1] for leaf in program.signature.inputs if leaf.dtype is not None}
    first = next(iter(named), ())
    if len(named) != 1 or not first or not isinstance(first[0], str):
        return [leaves]
    low = min((r.low for r in program.signature.ranges if r.name == first[0]), default=1)
    texts = len(tensors[0])
    length = tensors[0].shape[1] if tensors[0].dim() > 1 else 1
    size = max(1, low, _PART_ROWS // max(1, length))
    starts = range(0, texts, size)
    if texts - starts[-1] < low:
        return [leaves]
    return [
        [leaf[at : at + size] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for at in starts
    ]


def _predictions(
    source: Program, parts: list[list[Any]], keeps: list[Tensor | None]
) -> list[TeacherRows]:
    body, head = split_head(source.module)
    body.train(False)
    pairs = list(zip(parts, keeps, strict=True))
    with source.evaluating():
        return [_predicted(body, head, *pair) for pair in track(pairs, "teacher")]


def _predicted(
    body: Callable[..., Any], head: Head, leaves: list[Any], keep: Tensor | None
) -> TeacherRows:
    rows = kept_rows(body(*leaves), keep)
    width = head(rows[:1]).shape[-1] if len(rows) else 1
    parts = [TeacherRows.of(head(part)) for part in rows.split(max(1, _LOGITS // width))]
    teacher = TeacherRows.joined(parts)
    if not bool(torch.isfinite(teacher.log_probs).all()):
        raise UserInputError(
            "the float model's predictions for a calibration text are NaN or infinite",
            hint="look for a broken text, or check the model",
        )
    return teacher


def _logits_mask(program: Program, leaves: Sequence[Any]) -> Tensor | None:
    """Which positions of the logits are not padding."""
    return real_rows(program, leaves).of(output_value(program.graph)[0])


def kept_rows(states: Tensor, keep: Tensor | None) -> Tensor:
    """The rows of hidden states or logits that are not padding, `[n, H]`."""
    if keep is None or keep.shape != states.shape[:-1]:
        return states.flatten(0, -2)
    return states[keep]


def _divided(lessons: list[Lesson]) -> Lessons:
    """Hold out lessons at equal distances, so that every kind of text is among them.

    Raises:
        UserInputError: too few have a token.
    """
    rows = sum(len(lesson.teacher) for lesson in lessons)
    if len(lessons) < LEAST_LESSONS:
        raise _too_few(len(lessons))
    most = _MOST_HELD_OUT * len(lessons) // rows
    count = max(1, min(len(lessons) // _HELD_OUT, most))
    held = {(2 * at + 1) * len(lessons) // (2 * count) for at in range(count)}
    taught = [lesson for at, lesson in enumerate(lessons) if at not in held]
    return Lessons(taught, [lessons[at] for at in sorted(held)])


def _too_few(count: int) -> UserInputError:
    return UserInputError(
        f"the method learned needs {LEAST_LESSONS} calibration texts or more, and {count} are "
        "given",
        hint=_HINT,
    )

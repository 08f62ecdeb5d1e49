"""`report.html`: the course of a training, its effect on each layer, and sample answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.optional import require
from qalora_compile.pages import Mark, Page, line_chart
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.training.sample_answers import Question

REPORT_FILE = "report.html"
_ACCURACY = "held_out_accuracy"


@dataclass(frozen=True)
class LayerChange:
    """The change of a layer when its adapter is folded.

    Attributes:
        path: Path of the weight.
        shape: Shape as `K×N`.
        bits: Width of a code.
        rank: Ranks of the adapter that are in use: columns of B that are not all zero.
        norm: Frobenius norm of the change of scales and offsets.
        shift: Root mean square of the change of a zero-point, −offset / scale, in codes.
        largest: Its largest absolute value. Groups of equal weights, whose scale is 0, have no
            zero-point and are left out.
    """

    path: str
    shape: str
    bits: int
    rank: int
    norm: float
    shift: float
    largest: float


def layer_changes(program: Program) -> list[LayerChange]:
    """The changes that folding would make, one entry per adapted weight, in graph order."""
    before = program.tensors()
    after = FoldAdapters()(program).program.tensors()
    found = []
    for site in program.plan.weights_to_adapt():
        (scale, offset), (new_scale, new_offset) = (
            [tensors[f"{site.path}.{part}"].double() for part in ("scale", "offset")]
            for tensors in (before, after)
        )
        used = (scale != 0) & (new_scale != 0)
        moved = (offset[used] / scale[used] - new_offset[used] / new_scale[used]).abs()
        used_ranks = before[f"{site.path}.lora_B"].detach().flatten(0, -2).any(0)
        assert site.bits is not None
        found.append(
            LayerChange(
                path=site.path,
                shape=site.shape,
                bits=site.bits,
                rank=int(used_ranks.sum()),
                norm=float(torch.stack([new_scale - scale, new_offset - offset]).norm()),
                shift=float(moved.square().mean().sqrt()) if moved.numel() else 0.0,
                largest=float(moved.max()) if moved.numel() else 0.0,
            )
        )
    return found


@dataclass(frozen=True)
class Sample:
    """An example, and the model's answers before and after training."""

    question: Question
    before: str
    after: str


def check_report() -> None:
    """Check that the libraries for a report are installed.

    Raises:
        UnsupportedError: one of them is not.
    """
    for library in ("jinja2", "matplotlib"):
        require(library, extra="report", purpose="write the report of a training")


def write_report(
    path: Path,
    log: Sequence[Mapping[str, Any]],
    changes: Sequence[LayerChange],
    *,
    title: str,
    settings: Mapping[str, object],
    results: Mapping[str, object],
    samples: Sequence[Sample] = (),
    classifies: bool = False,
    unit: str = "tokens",
) -> None:
    """Write the report as one HTML file: settings, what changed, the course, and each layer.

    Args:
        path: The file; replaced where it exists.
        log: The lines of `log.jsonl`.
        changes: See `layer_changes`.
        title: Title of the page.
        settings: What the run was started with.
        results: Its outcome.
        samples: Examples with answers.
        classifies: Whether the answers are classes, not texts.
        unit: What the log counts as tokens: `tokens`, or `examples`.

    Raises:
        UserInputError: no step was run.
        UnsupportedError: a library is missing.
    """
    if not log:
        raise UserInputError("there is nothing to report: no step was run")
    page = Page(title)
    page.section("Settings")
    page.facts(settings)
    page.section("What changed")
    page.facts(results)
    if samples:
        _add_answers(page, samples, classifies=classifies)
    _add_curves(page, log, classifies=classifies, unit=unit)
    if changes:
        _add_layers(page, changes)
    page.write(path)


def _add_answers(page: Page, samples: Sequence[Sample], *, classifies: bool) -> None:
    answers = "The likeliest class" if classifies else "The likeliest tokens, one by one,"
    page.text(
        f"{answers} before and after training, to the first held-out examples, or else "
        "to the first examples of the training data."
    )
    page.table(
        ("prompt", "wanted", "before", "after"),
        [
            (s.question.prompt, s.question.wanted, _judged(s.before, s), _judged(s.after, s))
            for s in samples
        ],
        style="asked",
    )


def _judged(answer: str, sample: Sample) -> Mark:
    """An answer, right if it is the wanted one up to blanks at its ends."""
    return Mark(answer.strip(), answer.strip() == sample.question.wanted.strip())


def _add_curves(
    page: Page, log: Sequence[Mapping[str, Any]], *, classifies: bool, unit: str
) -> None:
    page.section("Course of the training")
    over = "examples" if classifies else "tokens that carry loss"
    series = {"training": _points(log, "loss"), "held out": _points(log, "held_out")}
    shown = {name: points for name, points in series.items() if points[0]}
    page.chart(line_chart(shown, x="step", y="loss"), f"Mean over the {over}, in nats.")
    right = _points(log, _ACCURACY)
    if right[0]:
        caption = (
            "Held-out examples that are put into their class."
            if classifies
            else "Held-out examples that are answered right to the last token."
        )
        page.chart(line_chart({"held out": right}, x="step", y="right", share=True), caption)
    rates = line_chart({"rate": _points(log, "learning_rate")}, x="step", y="learning rate")
    page.chart(rates, "Of the matrices A.")
    norms = line_chart({"norm": _points(log, "grad_norm")}, x="step", y="gradient norm", log_y=True)
    page.chart(norms, "Before clipping; the axis is logarithmic.")
    speeds = line_chart(
        {"speed": _points(log, "tokens_per_second")}, x="step", y=f"{unit} per second"
    )
    page.chart(speeds, f"{unit.capitalize()} of the inputs, with the time of the complete step.")


def _points(log: Sequence[Mapping[str, Any]], field: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have a field."""
    rows = [row for row in log if field in row]
    return [row["step"] for row in rows], [row[field] for row in rows]


def _add_layers(page: Page, changes: Sequence[LayerChange]) -> None:
    page.section(
        "Layers",
        "How far folding moves the zero-points −offset / scale, counted in codes: the root mean "
        "square over each layer.",
    )
    page.layer_map({change.path: change.shift for change in changes})
    page.text(
        "For each layer: the norm is that of what folding changes in scales and offsets (offset + "
        "scaling · f · B A), and the shift that of its zero-points, in codes."
    )
    columns = ("layer", "K×N", "bits", "rank", "norm", "shift", "largest shift")
    page.layer_tables(columns, [tuple(vars(change).values()) for change in changes])

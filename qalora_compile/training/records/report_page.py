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
from qalora_compile.pages import Page, bar_chart, line_chart
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.training.sample_answers import Question

REPORT_FILE = "report.html"
_ACCURACY = "held_out_accuracy"
_ROWS = 400
"""Layers that the table lists one by one."""


@dataclass(frozen=True)
class LayerChange:
    """The change of a layer when its adapter is folded.

    Attributes:
        path: Path of the weight.
        shape: Shape as `K×N`.
        bits: Width of a code.
        rank: Rank of the adapter.
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
        assert site.bits is not None
        assert site.rank is not None
        found.append(
            LayerChange(
                path=site.path,
                shape=site.shape,
                bits=site.bits,
                rank=site.rank,
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
    facts: Mapping[str, object],
    samples: Sequence[Sample] = (),
) -> None:
    """Write the report as one HTML file.

    Args:
        path: The file; replaced where it exists.
        log: The lines of `log.jsonl`.
        changes: See `layer_changes`.
        title: Title of the page.
        facts: Rows of its first table.
        samples: Examples with answers.

    Raises:
        UserInputError: no step was run.
        UnsupportedError: a library is missing.
    """
    if not log:
        raise UserInputError("there is nothing to report: no step was run")
    page = Page(title, f"{log[-1]['step']} steps")
    page.section("The run")
    page.facts(facts)
    _add_curves(page, log)
    _add_layers(page, changes)
    if samples:
        page.section("Before and after", "The likeliest answers to the first held-out examples.")
        for sample in samples:
            page.side_by_side(
                ("prompt", sample.question.prompt),
                ("wanted", sample.question.wanted),
                ("before training", sample.before),
                ("after training", sample.after),
            )
    page.write(path)


def _add_curves(page: Page, log: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in log]
    page.section("Loss", "Mean over the tokens that carry loss, in nats.")
    series = {"training": (steps, [row["loss"] for row in log])}
    held_out = [(row["step"], row["held_out"]) for row in log if "held_out" in row]
    if held_out:
        series["held out"] = ([s for s, _ in held_out], [v for _, v in held_out])
    page.chart(line_chart(series, x="step", y="loss"))
    right = [(row["step"], row[_ACCURACY]) for row in log if _ACCURACY in row]
    if right:
        page.section("Accuracy", "Share of held-out examples answered right to the last token.")
        shown = {"held out": ([s for s, _ in right], [v for _, v in right])}
        page.chart(line_chart(shown, x="step", y="accuracy"))
    page.section("Optimisation")
    rates = [row["learning_rate"] for row in log]
    page.chart(line_chart({"rate": (steps, rates)}, x="step", y="learning rate of A"))
    norms = [row["grad_norm"] for row in log]
    page.chart(
        line_chart({"norm": (steps, norms)}, x="step", y="gradient norm", log_y=True),
        "Before clipping.",
    )
    speeds = [row["tokens_per_second"] for row in log]
    page.chart(line_chart({"speed": (steps, speeds)}, x="step", y="tokens a second"))


def _add_layers(page: Page, changes: Sequence[LayerChange]) -> None:
    page.section(
        "Layers",
        "What folding changes in scales and offsets (offset + scaling · f · B A), and how far that "
        "moves the zero-points −offset / scale, counted in codes.",
    )
    paths = [change.path for change in changes]
    norms = {"norm": [change.norm for change in changes]}
    page.chart(bar_chart(paths, norms, y="norm of the change"))
    shifts = {
        "root mean square": [change.shift for change in changes],
        "largest": [change.largest for change in changes],
    }
    page.chart(bar_chart(paths, shifts, y="zero-point shift, codes", log_y=True))
    rows = [tuple(vars(change).values()) for change in changes[:_ROWS]]
    columns = ("layer", "K×N", "bits", "rank", "norm", "shift", "largest shift")
    cut = len(changes) - len(rows)
    page.table(columns, rows, f"{cut} more layers are in the charts alone." if cut else "")

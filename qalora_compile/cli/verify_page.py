"""The page of `verify --html`: verdict, errors by layer, zero-points, worst inputs, both graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qalora_compile import __version__
from qalora_compile.ir.program import Program
from qalora_compile.pages import Page, bar_chart, histogram
from qalora_compile.verify.certificate import Certificate
from qalora_compile.verify.compare import Comparison, Report
from qalora_compile.verify.graph import Graph
from qalora_compile.verify.judge import BEYOND, EXPLAINED
from qalora_compile.verify.numeric_report import NumericReport, Way
from qalora_compile.verify.sides import open_side

_LINES = 250
"""Of each graph."""
_ROWS = 20
Outcome = Report | NumericReport | Certificate


def verify_page(outcome: Outcome, a: Program, b: Program | Path, *, title: str) -> Page:
    """A page of what a check found.

    Args:
        outcome: The report or certificate.
        a: The reference.
        b: What was held to it: a program, or an exported model.
        title: Of the page.
    """
    page = Page(title, f"qalora-compile {__version__}")
    if isinstance(outcome, NumericReport):
        _numeric(page, outcome)
    elif isinstance(outcome, Certificate):
        _proof(page, outcome)
    else:
        _compared(page, outcome)
    _zero_points(page, a, b)
    _graphs(page, open_side(a), open_side(b))
    return page


def _numeric(page: Page, report: NumericReport) -> None:
    page.section("Verdict")
    page.facts(
        {
            "verdict": report.verdict,
            "reference": f"{report.reference}, in float64",
            "candidate": report.candidate,
            "first difference": report.difference or "none",
            "notes": "\n".join(report.notes) or "none",
        }
    )
    page.text(
        "Each value of the candidate is measured by its distance from the reference in float64, as "
        "a multiple of what rounding does to the reference itself. Up to "
        f"{EXPLAINED:g} rounding explains it, from {BEYOND:g} on it does not."
    )
    page.table(
        ("way of running", "verdict", "values", "largest ratio", "at", "on"),
        [(w.name, w.verdict, len(w.rows), *_worst_of(w)) for w in report.ways],
    )
    way = next((w for w in report.ways if w.verdict == report.verdict), report.ways[0])
    rows = [row for row in way.rows if row.kind in ("site", "output")]
    if rows:
        page.section("Errors by layer", f"Candidate: {way.name}.")
        names = [row.name for row in rows]
        relative = [(row.worst.own, row.worst.error, row.worst.scale or 1.0) for row in rows]
        page.chart(
            bar_chart(
                names,
                {
                    "reference, by rounding": [own / scale for own, _, scale in relative],
                    "candidate": [error / scale for _, error, scale in relative],
                },
                y="error / largest value",
                log_y=True,
            ),
            "Distance from float64 on the worst input of each layer, outputs last.",
        )
    worst = sorted(way.rows, key=lambda row: -row.worst.ratio)[:_ROWS]
    page.table(
        ("value", "ratio", "error", "of", "input", "reference", "candidate"),
        [(r.name, r.worst.ratio, r.worst.error, r.worst.scale, r.input, *r.lines) for r in worst],
        f"The {len(worst)} largest ratios of {len(way.rows)} values",
    )
    _worst_inputs(page, report)


def _worst_inputs(page: Page, report: NumericReport) -> None:
    page.section(
        "Worst inputs",
        "The largest ratio of any output on each input; – where the reference is not accurate "
        "itself, or all of it is padding.",
    )
    ran = [way for way in report.ways if way.inputs]
    if not ran:
        page.text("The candidate did not run.")
        return
    ratios = {way.name: dict(way.inputs) for way in ran}
    order = sorted(report.inputs, key=lambda name: -max(r.get(name, 0.0) for r in ratios.values()))
    page.table(
        ("input", *ratios), [(name, *(r.get(name, "–") for r in ratios.values())) for name in order]
    )


def _worst_of(way: Way) -> tuple[object, str, str]:
    worst = way.worst
    if worst is None:
        return "", way.problem, ""
    return worst.worst.ratio, worst.name, worst.input


def _compared(page: Page, report: Report) -> None:
    page.section("Verdict")
    page.facts(
        {
            "verdict": report.verdict,
            "reference": report.reference,
            "candidate": report.candidate,
            "tolerance": report.tolerance,
            "inputs": report.inputs,
            "first diverging site": report.first_divergence or "none",
        }
    )
    rows = [*report.sites, *report.outputs]
    page.section("Errors by layer")
    page.chart(
        bar_chart(
            [row.name for row in rows],
            {"difference": [row.max_rel for row in rows]},
            y="difference / largest value",
            log_y=True,
        ),
        "Largest difference of each layer's output over all inputs, outputs last.",
    )
    page.table(
        ("", "max abs", "max rel", "sqnr dB", "problem"),
        [_comparison(row) for row in sorted(rows, key=lambda c: -c.max_rel)[:_ROWS]],
        f"The {min(_ROWS, len(rows))} largest",
    )


def _comparison(row: Comparison) -> tuple[object, ...]:
    return row.name, row.max_abs, row.max_rel, row.sqnr_db, row.problem


def _proof(page: Page, certificate: Certificate) -> None:
    page.section("Verdict")
    page.facts(
        {
            "verdict": certificate.verdict,
            "reference": certificate.reference.label,
            "candidate": certificate.candidate.label,
            "for all inputs": "yes" if certificate.proved else "but for what was sampled",
            "sampled": "\n".join(certificate.sampled) or "nothing",
            "first difference": certificate.difference or "none",
            "notes": "\n".join(certificate.notes) or "none",
        }
    )
    rows = [(site.name, site.worst) for site in certificate.sites]
    shown = [(name, worst[1]) for name, worst in rows if worst is not None]
    if not shown:
        return
    page.section("Errors by layer")
    page.chart(
        bar_chart(
            [name for name, _ in shown],
            {"coefficients": [found.max_ratio for _, found in shown]},
            y="|ΔW| / what storing explains",
        ),
        "Largest difference of a coefficient, as a multiple of what storing it explains.",
    )
    shown.sort(key=lambda item: -item[1].max_ratio)
    page.table(
        ("layer", "max |ΔW|", "of what storing explains", "‖Δy‖ ≤ · ‖x‖", "at"),
        [
            (name, f.max_abs, f.max_ratio, f.operator, str(list(f.worst)))
            for name, f in shown[:_ROWS]
        ],
        f"The {min(_ROWS, len(shown))} largest",
    )


def _zero_points(page: Page, a: Program, b: Program | Path) -> None:
    """How zero-points moved, or, where one side has none to compare with, where they lie."""
    first = zero_points(a)
    if not first:
        return
    second = zero_points(b) if isinstance(b, Program) else {}
    both = [name for name in first if name in second and first[name].shape == second[name].shape]
    if both:
        moved = np.concatenate([(second[name] - first[name]).ravel() for name in both])
        page.section("Zero-points")
        page.chart(
            histogram(moved, x="shift of a zero-point, in codes"),
            f"What was folded into the {moved.size} zero-points of {len(both)} weights; "
            f"{int((moved != 0).sum())} moved, by up to {np.abs(moved).max():.3g} codes.",
        )
        return
    values = np.concatenate([z.ravel() for z in first.values()])
    off = values - np.round(values)
    page.section("Zero-points")
    page.chart(
        histogram(off, x="distance of a zero-point from the nearest whole number, in codes"),
        f"What rounding the {values.size} zero-points of {len(first)} weights would take away, and "
        "the export keeps.",
    )


def zero_points(program: Program) -> dict[str, NDArray[np.float64]]:
    """−offset / scale, `[N, L]`, of every weight in groups, by path; groups of scale 0 left out."""
    tensors = program.tensors()
    found = {}
    for path in dict.fromkeys(site.path for site in program.plan if site.bits is not None):
        names = [f"{path}.{part}" for part in ("scale", "offset")]
        if all(name in tensors for name in names):
            scale, offset = (tensors[n].detach().double().cpu().numpy() for n in names)
            used = scale != 0
            found[path] = np.where(used, -offset / np.where(used, scale, 1.0), 0.0)
    return found


def _graphs(page: Page, a: Graph, b: Graph) -> None:
    page.section("Graphs")
    page.beside(_text(a), _text(b), fold="both graphs, side by side")


def _text(graph: Graph) -> tuple[str, str]:
    lines: Sequence[str] = [
        node.line + (f"  # {node.path}" if node.path else "") for node in graph.nodes.values()
    ]
    shown = "\n".join(lines[:_LINES])
    if len(lines) > _LINES:
        shown += f"\n… and {len(lines) - _LINES} nodes more"
    return f"{graph.label}: {len(lines)} nodes", shown

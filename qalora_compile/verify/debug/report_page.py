"""The page of `verify --html`: verdict, errors by layer, zero-points, worst inputs, both graphs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qalora_compile._version import __version__
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.pages import Page, bar_chart, histogram
from qalora_compile.verify.compare import BEYOND, EXPLAINED, Comparison, Report
from qalora_compile.verify.numeric.report import ModeReport, NumericReport
from qalora_compile.verify.proof.certificate import Certificate
from qalora_compile.verify.proof.compare_weights import Coefficients
from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Tensor
from qalora_compile.verify.proof.graphs.read_fx import program_graph
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.match_structure import linear_of
from qalora_compile.verify.proof.open_graph import open_graph, open_graphs
from qalora_compile.verify.proof.weights.linear_map import Linear, NotLinearError
from qalora_compile.verify.proof.weights.unpack import row_codes

_LINES = 250
"""The largest number of lines of a graph that is shown in one piece."""
_LAYER = re.compile(r"(?:[^./\s]+\.)*?\d+(?=[./]|$)")
_CHUNK = 1 << 22
_UNMOVED = 1e-4
"""In codes. Storing a real zero-point in float32 moves it by less."""
_ROWS = 20
Outcome = Report | NumericReport | Certificate


def verify_page(outcome: Outcome, a: Program, b: Program | Path, *, title: str) -> Page:
    """An HTML page of the findings of a check.

    Args:
        outcome: The report or certificate.
        a: The reference.
        b: The candidate, a program or an exported model.
        title: Title of the page.
    """
    page = Page(title, f"qalora-compile {__version__}")
    if isinstance(outcome, NumericReport):
        _numeric(page, outcome)
    elif isinstance(outcome, Certificate):
        _proof(page, outcome)
    else:
        _compared(page, outcome)
    graphs = open_graph(a), open_graphs(b)
    _zero_points(page, a, b, graphs[1])
    _graphs(page, graphs[0], *graphs[1])
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
        ("execution mode", "verdict", "values", "largest ratio", "at", "on"),
        [(w.name, w.verdict, len(w.rows), *_worst_of(w)) for w in report.modes],
    )
    mode = next((w for w in report.modes if w.verdict == report.verdict), report.modes[0])
    rows = [row for row in mode.rows if row.kind in ("site", "output")]
    if rows:
        page.section("Errors by layer", f"Candidate: {mode.name}.")
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
    worst = sorted(mode.rows, key=lambda row: -row.worst.ratio)[:_ROWS]
    page.table(
        ("value", "ratio", "error", "of", "input", "reference", "candidate"),
        [(r.name, r.worst.ratio, r.worst.error, r.worst.scale, r.input, *r.lines) for r in worst],
        f"The {len(worst)} largest ratios of {len(mode.rows)} values",
    )
    _worst_inputs(page, report)


def _worst_inputs(page: Page, report: NumericReport) -> None:
    page.section(
        "Worst inputs",
        "The largest ratio of any output on each input; – where the reference is not accurate "
        "itself, all of it is padding, or that mode ran on one input only.",
    )
    ran = [mode for mode in report.modes if mode.inputs]
    if not ran:
        page.text("The candidate did not run.")
        return
    ratios = {mode.name: dict(mode.inputs) for mode in ran}
    order = sorted(report.inputs, key=lambda name: -max(r.get(name, 0.0) for r in ratios.values()))
    page.table(
        ("input", *ratios), [(name, *(r.get(name, "–") for r in ratios.values())) for name in order]
    )


def _worst_of(mode: ModeReport) -> tuple[object, str, str]:
    worst = mode.worst
    if worst is None:
        return "", mode.problem, ""
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
    page.section("Worst inputs", "The largest difference of any output on each input.")
    page.table(
        ("input", "max abs", "max rel", "sqnr dB", "problem"),
        [_comparison(row) for row in sorted(report.by_input, key=lambda c: -c.max_rel)],
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
            "for all inputs": "yes" if certificate.proved else "except for sampled parts",
            "sampled": "\n".join(certificate.sampled) or "nothing",
            "first difference": certificate.difference or "none",
            "notes": "\n".join(certificate.notes) or "none",
        }
    )
    rows = [(site.name, site.worst) for site in certificate.sites]
    shown = [(name, worst[1]) for name, worst in rows if worst is not None]
    if shown:
        _proved_layers(page, shown)
    _worst_of_proof(page, certificate, shown)


def _proved_layers(page: Page, shown: Sequence[tuple[str, Coefficients]]) -> None:
    page.section("Errors by layer")
    page.chart(
        bar_chart(
            [name for name, _ in shown],
            {"coefficients": [found.max_ratio for _, found in shown]},
            y="|ΔW| / storage rounding",
        ),
        "Largest difference of a coefficient, as a multiple of the rounding of stored values.",
    )
    page.table(
        ("layer", "max |ΔW|", "multiple of storage rounding", "‖Δy‖ ≤ · ‖x‖", "at"),
        [
            (name, f.max_abs, f.max_ratio, f.operator, str(list(f.worst)))
            for name, f in _largest(shown)
        ],
        f"The {min(_ROWS, len(shown))} largest",
    )


def _largest(shown: Sequence[tuple[str, Coefficients]]) -> list[tuple[str, Coefficients]]:
    return sorted(shown, key=lambda item: -item[1].max_ratio)[:_ROWS]


def _worst_of_proof(
    page: Page, certificate: Certificate, shown: Sequence[tuple[str, Coefficients]]
) -> None:
    """The layer inputs that show the worst coefficients, and the results of samples."""
    page.section(
        "Worst inputs",
        "A proof holds for all inputs and tries none. The input that shows a layer's worst "
        "coefficient alone is 1 in one column and 0 elsewhere.",
    )
    page.table(
        ("layer", "1 in column", "multiple of storage rounding"),
        [(name, f.worst[-1], f.max_ratio) for name, f in _largest(shown)],
    )
    tried = [(s.name, s.sampled) for s in certificate.segments if s.sampled is not None]
    if tried:
        tried.sort(key=lambda item: -item[1])
        page.table(
            ("between layers", "largest difference on samples"),
            tried[:_ROWS],
            f"The {min(_ROWS, len(tried))} largest of {len(tried)} parts that were sampled",
        )


def _zero_points(page: Page, a: Program, b: Program | Path, graphs: Sequence[Graph]) -> None:
    """How zero-points moved from `a` to `b`, and how far from integers they are there."""
    first = zero_points(a)
    if not first:
        return
    second = zero_points(b) if isinstance(b, Program) else {}
    second = second or effective_zero_points(a, graphs)
    page.section("Zero-points")
    both = [name for name in first if name in second and first[name].shape == second[name].shape]
    lost = len(first) - len(both)
    if lost:
        page.text(f"For {lost} of {len(first)} weights, B holds no zero-points that can be read.")
    if both:
        moved = np.concatenate([(second[name] - first[name]).ravel() for name in both])
        page.chart(
            histogram(moved, x="shift of a zero-point, in codes"),
            f"From A to B, of the {moved.size} zero-points of {len(both)} weights; "
            f"{int((np.abs(moved) > _UNMOVED).sum())} moved by more than {_UNMOVED:g}, by up to "
            f"{np.abs(moved).max():.3g} codes. Folding moves them; exporting a folded program "
            "does not.",
        )
    shown = {name: second[name] for name in both} or first
    values = np.concatenate([z.ravel() for z in shown.values()])
    page.chart(
        histogram(
            values - np.round(values),
            x="distance of a zero-point from the nearest integer, in codes",
        ),
        f"What rounding the {values.size} zero-points of {len(shown)} weights would take away, and "
        f"{'B' if both else 'A'} keeps.",
    )


def zero_points(program: Program) -> dict[str, NDArray[np.float64]]:
    """Zero-points −offset / scale, `[N, L]`, by path of the weight, without groups of scale 0."""
    tensors = program.tensors()
    found = {}
    for path in dict.fromkeys(site.path for site in program.plan if site.bits is not None):
        names = [f"{path}.{part}" for part in ("scale", "offset")]
        if all(name in tensors for name in names):
            scale, offset = (tensors[n].detach().double().cpu().numpy() for n in names)
            used = scale != 0
            found[path] = np.where(used, -offset / np.where(used, scale, 1.0), 0.0)
    return found


def effective_zero_points(
    program: Program, graphs: Sequence[Graph]
) -> dict[str, NDArray[np.float64]]:
    """The zero-points that the weights of `graphs` have on the codes and scales of a program.

    They are `mean(q − W / scale)` of each group, with W the effective weight as a proof reads it.
    This holds however a target stores zero-points (as real numbers, or as integers with a
    correction or its digits). Layers that the graph lacks, layers that are not a linear map there,
    and experts are left out.
    """
    held, found = program_graph(program), dict[str, NDArray[np.float64]]()
    plan = {site.path: site for site in program.plan if site.bits is not None}
    for graph in graphs:
        for row in graph.sites.values():
            mine = plan.get(row.path)
            if mine is None or row.experts is not None or row.path in found:
                continue
            try:
                linear = linear_of(graph, row)
            except NotLinearError:
                continue
            packed, scale = (held.tensors.get(f"{row.path}.{p}") for p in ("qweight", "scale"))
            if (
                packed is not None
                and scale is not None
                and (linear.n, linear.k) == (mine.n, mine.k)
            ):
                found[row.path] = _amount_to(linear, packed, scale, mine)
    return found


def _amount_to(
    linear: Linear, packed: StoredTensor, scale: StoredTensor, site: Site
) -> NDArray[np.float64]:
    """`mean(q − W / scale)` of each group, `[N, L]`, some rows at a time; 0 if the scale is 0."""
    assert site.bits is not None and site.group_size is not None, "the site is quantized"
    starts = np.arange(0, site.k, site.group_size)
    widths = np.diff(np.append(starts, site.k))
    parts = []
    for start in range(0, site.n, step := max(1, _CHUNK // site.k)):
        part = slice(start, min(start + step, site.n))
        codes = row_codes(packed.read()[part], site.bits, site.k).astype(np.float64)
        s = scale.values()[part].astype(np.float64)
        weight = np.add.reduceat(linear.rows(part, -1).weight, starts, axis=1) / widths
        middle = np.add.reduceat(codes, starts, axis=1) / widths
        parts.append(np.where(s != 0, middle - weight / np.where(s != 0, s, 1.0), 0.0))
    return np.concatenate(parts)


def _graphs(page: Page, *graphs: Graph) -> None:
    """The graphs side by side; long ones layer by layer, so that both are shown completely."""
    page.section("Graphs")
    if max(len(graph.nodes) for graph in graphs) <= _LINES:
        columns = [(_heading(g), "\n".join(map(_line, g.nodes.values()))) for g in graphs]
        page.side_by_side(*columns, fold="the graphs, side by side")
        return
    page.facts({"ABCDEFGH"[place]: _heading(graph) for place, graph in enumerate(graphs)})
    layers = [_by_layer(graph) for graph in graphs]
    for layer in dict.fromkeys(name for one in layers for name in one):
        lines = [one.get(layer, []) for one in layers]
        counts = " | ".join(str(len(one)) for one in lines)
        columns = [
            (graph.label, "\n".join(one)) for graph, one in zip(graphs, lines, strict=True) if one
        ]
        page.side_by_side(*columns, fold=f"{layer or 'outside of all layers'}: {counts} nodes")


def _heading(graph: Graph) -> str:
    return f"{graph.label}: {len(graph.nodes)} nodes"


def _line(node: Node) -> str:
    return node.line + (f"  # {node.path}" if node.path else "")


def _by_layer(graph: Graph) -> dict[str, list[str]]:
    """The nodes as text, in order, by the numbered layer that contains them; "" for the rest.

    An ONNX node's layer is that of its name or of a tensor that it reads, otherwise that of the
    node before it.
    """
    found: dict[str, list[str]] = {}
    layer = ""
    for node in graph.nodes.values():
        named = graph.dialect == FX or "/" in node.path
        read = [arg.name for arg in node.args if isinstance(arg, Tensor) and "." in arg.name]
        said = [node.path] if named and node.path else read[:1]
        if said:
            layer = m[0] if (m := _LAYER.match(said[0])) else ""
        found.setdefault(layer, []).append(_line(node))
    return found

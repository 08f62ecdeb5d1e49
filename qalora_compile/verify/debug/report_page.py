"""The page of `verify --html`: verdict, errors by layer, zero-points, worst inputs, both graphs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qalora_compile._version import __version__
from qalora_compile.ir.program import Program
from qalora_compile.pages import Mark, Page, histogram
from qalora_compile.verdict import Verdict
from qalora_compile.verify.compare import BEYOND, EXPLAINED, Comparison, Report
from qalora_compile.verify.debug.zero_points import effective_zero_points, zero_points
from qalora_compile.verify.numeric.report import ModeReport, NumericReport
from qalora_compile.verify.proof.certificate import Certificate, counts_text
from qalora_compile.verify.proof.compare_weights import Coefficients
from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Tensor
from qalora_compile.verify.proof.open_graph import open_graph, open_graphs

_LINES = 250
"""The largest number of lines of a graph that is shown in one piece."""
_LAYER = re.compile(r"(?:[^./\s]+\.)*?\d+(?=[./]|$)")
_UNMOVED = 1e-4
"""In codes. Storing a real zero-point in float32 moves it by less."""
_ROWS = 20
_GOOD = {
    Verdict.PROVED: True,
    Verdict.PROVED_UNDER: True,
    Verdict.EQUAL: True,
    Verdict.SAMPLED: None,
    Verdict.UNDECIDED: None,
    Verdict.DIFFERENT: False,
}
Outcome = Report | NumericReport | Certificate


def verify_page(
    outcome: Outcome,
    a: Program,
    b: Program | Path,
    *,
    title: str,
    settings: Mapping[str, object] | None = None,
) -> Page:
    """An HTML page of the findings of a check.

    Args:
        outcome: The report or certificate.
        a: The reference.
        b: The candidate, a program or an exported model.
        title: Title of the page.
        settings: What the check was run with, to be shown with what is known of `a`.
    """
    page = Page(title, f"qalora-compile {__version__}")
    page.verdict(mark_of(outcome.verdict), _sentence(outcome))
    page.section("Settings")
    page.facts({**plan_facts(a), **(settings or {})})
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


def mark_of(verdict: Verdict) -> Mark:
    """A verdict with its sign and colour."""
    return Mark(str(verdict), _GOOD[verdict])


def _sentence(outcome: Outcome) -> str:
    if isinstance(outcome, Certificate):
        holds = f"by proof, for all inputs: {outcome.scope}"
    elif isinstance(outcome, NumericReport):
        holds = f"value by value, relative to float64, on {len(outcome.inputs)} inputs"
    else:
        holds = f"on {outcome.inputs} inputs, tolerance {outcome.tolerance}"
    found = outcome.first_divergence if isinstance(outcome, Report) else outcome.difference
    return f"{holds}. First difference: {found.splitlines()[0]}" if found else f"{holds}."


def plan_facts(program: Program) -> dict[str, object]:
    """Bits, group sizes and ranks of a program's layers, by how many layers have them."""
    quantized = [site for site in program.plan if site.bits is not None]
    facts: dict[str, object] = {"stage": program.stage, "quantized layers": len(quantized)}
    for name, field in (("bits", "bits"), ("group size", "group_size"), ("rank", "rank")):
        counts = Counter(getattr(site, field) for site in quantized)
        counts.pop(None, None)
        if counts:
            facts[name] = _counted(counts)
    return facts


def _counted(counts: Counter[object]) -> str:
    """`4`, or `4 (210 layers), 8 (2 layers)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.most_common())


def _numeric(page: Page, report: NumericReport) -> None:
    page.section(
        "Execution modes",
        "Each value of the candidate is measured by its distance from the reference in float64, as "
        "a multiple of what rounding does to the reference itself. Up to "
        f"{EXPLAINED:g} rounding explains it, from {BEYOND:g} on it does not.",
    )
    page.facts(
        {
            "reference": f"{report.reference}, in float64",
            "candidate": report.candidate,
            "first difference": report.difference or "none",
            "notes": "\n".join(report.notes) or "none",
        }
    )
    page.table(
        ("execution mode", "verdict", "values", "largest ratio", "at", "on"),
        [(w.name, mark_of(w.verdict), len(w.rows), *_worst_of(w)) for w in report.modes],
    )
    mode = next((w for w in report.modes if w.verdict == report.verdict), report.modes[0])
    _numeric_layers(page, mode)
    _worst_values(page, mode)
    _worst_inputs(page, report)


def _numeric_layers(page: Page, mode: ModeReport) -> None:
    rows = [row for row in mode.rows if row.kind in ("site", "output")]
    if not rows:
        return
    page.section(
        "Errors by layer",
        f"The largest ratio of each layer's output, on its worst input. Candidate: {mode.name}.",
    )
    page.layer_map(
        {row.name: row.worst.ratio for row in rows},
        f"Rounding explains a ratio up to {EXPLAINED:g}, which has the full colour.",
        top=EXPLAINED,
    )
    page.layer_tables(
        ("layer", "ratio", "error", "largest value", "input"),
        [(r.name, r.worst.ratio, r.worst.error, r.worst.scale, r.input) for r in rows],
    )


def _worst_values(page: Page, mode: ModeReport) -> None:
    worst = sorted(mode.rows, key=lambda row: -row.worst.ratio)[:_ROWS]
    if not worst:
        return
    page.section("Worst values", f"The {len(worst)} largest ratios of {len(mode.rows)} values.")
    with page.fold("ratios", f"{len(worst)} values"):
        page.table(
            ("value", "ratio", "error", "largest value", "input"),
            [(r.name, r.worst.ratio, r.worst.error, r.worst.scale, r.input) for r in worst],
        )
    with page.fold("the nodes of these values"):
        page.table(("value", "reference", "candidate"), [(r.name, *r.lines) for r in worst])


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
    with page.fold("ratios", f"{len(order)} inputs"):
        page.table(
            ("input", *ratios),
            [(name, *(r.get(name, "–") for r in ratios.values())) for name in order],
        )


def _worst_of(mode: ModeReport) -> tuple[object, str, str]:
    worst = mode.worst
    if worst is None:
        return "", mode.problem, ""
    return worst.worst.ratio, worst.name, worst.input


def _compared(page: Page, report: Report) -> None:
    rows = [*report.sites, *report.outputs]
    page.section(
        "Errors by layer",
        "The largest difference of each layer's output over all inputs, as a fraction of its "
        "largest value.",
    )
    page.facts(
        {
            "reference": report.reference,
            "candidate": report.candidate,
            "tolerance": report.tolerance,
            "first diverging site": report.first_divergence or "none",
        }
    )
    if rows:
        page.layer_map({row.name: row.max_rel for row in rows})
    columns = ("layer", "max abs", "max rel", "sqnr dB", "problem")
    page.layer_tables(columns, [_comparison(row) for row in rows])
    worst = sorted(rows, key=lambda row: -row.max_rel)[:_ROWS]
    page.table(("", *columns[1:]), [_comparison(row) for row in worst], f"The {len(worst)} largest")
    page.section("Worst inputs", "The largest difference of any output on each input.")
    page.table(
        ("input", *columns[1:]),
        [_comparison(row) for row in sorted(report.by_input, key=lambda c: -c.max_rel)],
    )


def _comparison(row: Comparison) -> tuple[object, ...]:
    return row.name, row.max_abs, row.max_rel, row.sqnr_db, row.problem


def _proof(page: Page, certificate: Certificate) -> None:
    page.section("What was proved")
    page.facts(
        {
            "reference": certificate.reference.label,
            "candidate": certificate.candidate.label,
            "for all inputs": certificate.scope,
            "conditions": "\n".join(certificate.conditions) or "none",
            "layers": counts_text(Counter(site.status for site in certificate.sites)),
            "between layers": counts_text(Counter(part.status for part in certificate.segments)),
            "tokenizer": certificate.tokenizer,
            "first difference": certificate.difference or "none",
            "notes": "\n".join(certificate.notes) or "none",
        }
    )
    if certificate.sampled:
        with page.fold("parts that were sampled", f"{len(certificate.sampled)} parts"):
            page.text("\n".join(certificate.sampled))
    rows = [(site.name, site.worst) for site in certificate.sites]
    shown = [(name, worst[1]) for name, worst in rows if worst is not None]
    if shown:
        _proved_layers(page, shown)
    _worst_of_proof(page, certificate, shown)


def _proved_layers(page: Page, shown: Sequence[tuple[str, Coefficients]]) -> None:
    page.section(
        "Errors by layer",
        "The largest difference of a coefficient, as a multiple of the rounding of stored values: "
        "up to 1 they are equal.",
    )
    page.layer_map({name: found.max_ratio for name, found in shown}, top=1.0)
    page.layer_tables(
        ("layer", "max |ΔW|", "multiple of storage rounding", "‖Δy‖ ≤ · ‖x‖", "at"),
        [(name, f.max_abs, f.max_ratio, f.operator, str(list(f.worst))) for name, f in shown],
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

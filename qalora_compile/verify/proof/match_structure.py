"""Compares the nodes around the rewritten layers of two graphs by structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.verify.proof.aliasing import refuse_hidden_writes
from qalora_compile.verify.proof.compare_leaves import parted
from qalora_compile.verify.proof.graphs.graph import FX, ONNX, OPENVINO, Graph, Ref, SiteRow
from qalora_compile.verify.proof.nonfinite import damages
from qalora_compile.verify.proof.open_graph import open_graph
from qalora_compile.verify.proof.symbolic.prove_segment import SymbolicProof
from qalora_compile.verify.proof.symbolic.tensor import UnprovableError
from qalora_compile.verify.proof.terms.op_semantics import OPERATORS
from qalora_compile.verify.proof.terms.semantics import Semantics
from qalora_compile.verify.proof.terms.term import Algebra, Term, differences
from qalora_compile.verify.proof.weights.fx_layers import fx_linear
from qalora_compile.verify.proof.weights.linear_map import Linear, NotLinearError
from qalora_compile.verify.proof.weights.onnx_layers import function_linears, onnx_linear
from qalora_compile.verify.proof.weights.openvino_layers import openvino_linear
from qalora_compile.verify.proof.weights.regroup_sums import regroup_sums

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program

PROVED, SAMPLED, DIFFERENT, OPEN = "proved", "sampled", "different", "open"
_ABSENT = "(nothing)"


@dataclass(frozen=True)
class Segment:
    """The nodes that compute one input of a site, or one output of the model, from earlier sites.

    Attributes:
        name: `input of <site>` or `output <name>`.
        status: `proved`: both graphs have the same term; `different`: they do not; `open`: one
            graph has an opaque operator, which the other dialect cannot express; `sampled`: open,
            but equal on samples.
        lines: The first two nodes that differ, or are opaque, one from each graph.
        targets: The computed operands in both graphs.
        sampled: Largest difference on samples, relative to the largest value; None if not sampled.
        conditions: What inputs have to meet for the proof to hold.
        problem: Why an open segment has no symbolic proof either: the operator at fault.
    """

    name: str
    status: str
    lines: tuple[str, str] | None
    targets: tuple[Any, Any]
    sampled: float | None = None
    conditions: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Pair:
    """A site of both graphs as linear maps.

    Attributes:
        site: The site.
        maps: Its linear maps in both graphs; None if it is compared with its surroundings.
        functions: For each graph (0 or 1), a function from the map by its operators to alternative
            maps by the functions in its file.
        problem: Why there are no maps, or "".
    """

    site: SiteRow
    maps: tuple[Linear, Linear] | None
    functions: tuple[tuple[int, Callable[[Linear], Mapping[str, Linear]]], ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Structure:
    """The outcome of a comparison by structure.

    Attributes:
        pairs: The sites of both graphs.
        segments: The nodes between them.
        notes: Notes on widened tensors.
    """

    pairs: tuple[Pair, ...]
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether everything outside the layers is structurally equal.

        A site that is not a linear map in both graphs counts as outside the layers.
        """
        return all(s.status == PROVED for s in self.segments)

    @property
    def difference(self) -> str | None:
        """The first difference, as text with a line for each graph, or None."""
        problem = next((f"{p.site.name}: {p.problem}" for p in self.pairs if p.problem), None)
        for segment in self.segments:
            if segment.status != PROVED and segment.lines is not None:
                lines = f"{segment.name}\n  {segment.lines[0]}\n  {segment.lines[1]}"
                return lines if problem is None else f"{problem}\n  and {lines}"
        return None


def compare_structure(
    reference: Program | Graph | str | Path,
    candidate: Program | Graph | str | Path,
    layers: list[Pair] | None = None,
) -> Structure:
    """Compare two programs, or a program and an exported model, outside of their layers.

    Names, the order of independent nodes and the nodes that compute a quantized site do not count.
    Constants are compared bit for bit, half precision after widening to float32; NaN, and
    infinities outside of masks, are equal to nothing.

    Args:
        reference: A program, graph or path.
        candidate: Likewise.
        layers: The sites of both graphs; None: those of the same names.

    Raises:
        UserInputError: a graph cannot be read, or writes into tensors in place such that readers
            cannot be determined.
    """
    a, b = open_graph(reference), open_graph(candidate)
    for graph in (a, b):
        refuse_hidden_writes(graph)
        if layers is None:
            regroup_sums(graph)
    pairs, wanted, both, widened = _read(a, b, layers)
    mixed = a.dialect != b.dialect
    segments = [
        _segment(name, targets, (both[0].of(targets[0]), both[1].of(targets[1])), mixed)
        for name, targets in wanted
    ]
    segments = _symbolically((a, b), pairs, segments)
    segments += _unmatched_outputs(a, b)
    segments += [Segment(text, DIFFERENT, None, (None, None)) for text in damages((a, b))]
    notes = ["half precision is compared as widened to float32"] if widened else []
    return Structure(tuple(pairs), tuple(segments), tuple(notes))


def _symbolically(
    graphs: tuple[Graph, Graph], pairs: list[Pair], segments: list[Segment]
) -> list[Segment]:
    """Segments, with a symbolic proof of those without one by structure."""
    if all(segment.status == PROVED for segment in segments):
        return segments
    read = [(p.site, p.maps) for p in pairs if p.maps is not None]
    sites = tuple(
        {graph.site_values[s.name]: (s.name, maps[i].source[0], s.n, s.k) for s, maps in read}
        for i, graph in enumerate(graphs)
    )
    proof = SymbolicProof(graphs, (sites[0], sites[1]))
    return [s if s.status == PROVED else _tried(proof, s) for s in segments]


def _tried(proof: SymbolicProof, segment: Segment) -> Segment:
    try:
        conditions = proof.conditions(segment.targets)
    except UnprovableError as error:
        problem = str(error) if segment.status == OPEN else ""
        return dataclasses.replace(segment, problem=problem)
    return dataclasses.replace(segment, status=PROVED, lines=None, conditions=conditions)


@dataclass(frozen=True)
class Match:
    """A value that both graphs compute.

    Attributes:
        name: `input of <site>`, `<site>`, `output <name>`, or that of the reference's node.
        kind: `read` by a site, the output of a `site`, an `output`, or a `node` between them.
        values: The operands in both graphs.
        lines: The nodes as text; if the structure differs, the nodes at which it diverges.
        path: Module path in the user's model, where it is known.
    """

    name: str
    kind: str
    values: tuple[Any, Any]
    lines: tuple[str, str]
    path: str = ""


def match_values(a: Graph, b: Graph) -> list[Match]:
    """The values that two graphs have in common, in the order of the first graph.

    Inputs and outputs of sites and outputs of the model are matched by name; nodes between them are
    matched if they are the same computation from the same sites.
    """
    _, wanted, both, _ = _read(a, b)
    found: dict[str, Match] = {}
    mixed = a.dialect != b.dialect
    for name, targets in wanted:
        segment = _segment(name, targets, (both[0].of(targets[0]), both[1].of(targets[1])), mixed)
        shown = segment.lines or (a.line(targets[0]), b.line(targets[1]))
        kind = "output" if name.startswith("output ") else "read"
        found[name] = Match(name, kind, targets, shown, name.partition(" of ")[2])
    for name in [n for n in a.site_values if n in b.site_values]:
        values = (Ref(a.site_values[name]), Ref(b.site_values[name]))
        lines = (a.line(values[0]), b.line(values[1]))
        found[name] = Match(name, "site", values, lines, name)
    taken = {m.values[0] for m in found.values()}
    others = {computed.key: value for value, computed in both[1].computed().items()}
    for value, computed in both[0].computed().items():
        ref, other = Ref(value), others.get(computed.key)
        if other is not None and ref not in taken:
            lines = (a.line(ref), b.line(Ref(other)))
            path = a.nodes[value].path
            found[f"node {value}"] = Match(f"node {value}", "node", (ref, Ref(other)), lines, path)
    return _in_order(a, found.values())


def _in_order(graph: Graph, matches: Iterable[Match]) -> list[Match]:
    """Sort key: the value's position in the graph, inputs of a site before the site."""
    place = {name: index for index, name in enumerate(graph.nodes)}

    kinds = ("site", "node", "read", "output")

    def key(match: Match) -> tuple[bool, int, int]:
        operand = match.values[0]
        at = place.get(operand.name, -1) if isinstance(operand, Ref) else -1
        return match.kind == "output", at, kinds.index(match.kind)

    return sorted(matches, key=key)


_Wanted = list[tuple[str, tuple[Any, Any]]]


def _read(
    a: Graph, b: Graph, layers: list[Pair] | None = None
) -> tuple[list[Pair], _Wanted, list[Semantics], bool]:
    """The sites, the values to compare, the semantics, and whether half precision is widened."""
    pairs = _pairs(a, b) if layers is None else layers
    cuts = {p.site.name for p in pairs if p.maps is not None}
    halves = a.half != b.half
    algebra = Algebra(single=a.dialect != b.dialect, halves=halves)
    both = [
        Semantics(
            graph,
            algebra,
            {graph.site_values[name]: name for name in cuts},
            OPERATORS[graph.dialect],
        )
        for graph in (a, b)
    ]
    wanted = _targets(a, b, pairs)
    for each, index in zip(both, (0, 1), strict=True):
        each.make([targets[index] for _, targets in wanted])
    return pairs, wanted, both, halves or algebra.widened


def _pairs(a: Graph, b: Graph) -> list[Pair]:
    pairs = []
    for name, site in a.sites.items():
        if name not in b.sites:
            pairs.append(Pair(site, None, (), f"the site is missing in {b.label}"))
            continue
        try:
            pairs.append(_pair(a, b, site))
        except NotLinearError as problem:
            pairs.append(Pair(site, None, (), str(problem)))
    missing = [site for name, site in b.sites.items() if name not in a.sites]
    pairs += [Pair(s, None, (), f"the site is missing in {a.label}") for s in missing]
    return pairs


def _pair(a: Graph, b: Graph, site: SiteRow) -> Pair:
    first, second = _linear(a, site), _linear(b, b.sites[site.name])
    if len(first.source) != len(second.source):
        raise NotLinearError("the rows of experts are given in different forms")
    functions = tuple(
        (index, partial(function_linears, graph, graph.sites[site.name]))
        for index, graph in enumerate((a, b))
        if graph.functions
    )
    return Pair(site, (first, second), functions)


_LINEARS = {FX: fx_linear, ONNX: onnx_linear, OPENVINO: openvino_linear}


def linear_of(graph: Graph, site: SiteRow) -> Linear:
    """The linear map that a site computes, in any dialect.

    Raises:
        NotLinearError: its nodes do not have a form that this package writes.
    """
    return _LINEARS[graph.dialect](graph, site)


def _linear(graph: Graph, site: SiteRow) -> Linear:
    try:
        return linear_of(graph, site)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise NotLinearError(
            f"the nodes of the layer in {graph.label} do not fit their operators' definition: "
            f"{error!r}"
        ) from error


def _targets(a: Graph, b: Graph, pairs: list[Pair]) -> _Wanted:
    """The values that are compared: the inputs of the sites, then the outputs."""
    found: _Wanted = []
    for pair in pairs:
        if pair.maps is not None:
            sources = zip(pair.maps[0].source, pair.maps[1].source, strict=True)
            for index, operands in enumerate(sources):
                what = "input" if index == 0 else "rows by expert"
                found.append((f"{what} of {pair.site.name}", operands))
    both = [name for name in a.outputs if name in b.outputs]
    found += [(f"output {name}", (a.outputs[name], b.outputs[name])) for name in both]
    return found


def _unmatched_outputs(a: Graph, b: Graph) -> list[Segment]:
    """Outputs that only one graph has; None does not count as an output of an ONNX model."""
    found = []
    for one, other, flip in ((a, b, False), (b, a, True)):
        for name, value in one.outputs.items():
            if name not in other.outputs and value is not None:
                lines = (one.line(value), _ABSENT)
                shown = (lines[1], lines[0]) if flip else lines
                found.append(Segment(f"output {name}", DIFFERENT, shown, (None, None)))
    return found


def _segment(name: str, targets: tuple[Any, Any], terms: tuple[Term, Term], mixed: bool) -> Segment:
    found = differences(*terms, mixed=mixed)
    if not found:
        return Segment(name, PROVED, None, targets)
    known = [d for d in found if d.known]
    first = known[0] if known else found[0]
    lines = (first.reference, first.candidate)
    if not known:
        leaves = parted(*terms)
        return Segment(name, OPEN if leaves is None else DIFFERENT, leaves or lines, targets)
    return Segment(name, DIFFERENT, lines, targets)

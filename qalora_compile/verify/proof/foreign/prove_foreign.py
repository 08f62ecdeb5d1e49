"""Proves a program and an ONNX file of another program equal: optimum, torch.onnx, GenAI's builder.

Such a file names no layers. They are found by their weights, which have to be equal bit for bit, or
be codes of those of the program; everything else is compared as for files of this package.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY, PAST
from qalora_compile.ir.onnx_metadata import OnnxMetadata
from qalora_compile.untrusted.artifacts import ArtifactKind, find_artifact
from qalora_compile.untrusted.ort_file import check_model
from qalora_compile.verify.proof.certificate import Certificate, GraphRecord
from qalora_compile.verify.proof.foreign.assumptions import TYPES, assume
from qalora_compile.verify.proof.foreign.match_products import FARTHEST, Matched, matched
from qalora_compile.verify.proof.foreign.products import LOOKUP, Product, cut_into, products_of
from qalora_compile.verify.proof.graphs.graph import Graph, SiteRow
from qalora_compile.verify.proof.graphs.read_fx import program_graph
from qalora_compile.verify.proof.graphs.read_onnx import graph_of, load_model
from qalora_compile.verify.proof.match_structure import (
    DIFFERENT,
    OPEN,
    PROVED,
    Pair,
    Segment,
    Structure,
    compare_structure,
)
from qalora_compile.verify.proof.open_graph import onnx_files
from qalora_compile.verify.proof.prove import certificate_of, prove_site
from qalora_compile.verify.proof.records import record_of
from qalora_compile.verify.proof.weights.linear_map import Linear, Rows

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program

_OTHERS = "another program's"
_OTHER_NODES = "other nodes, which are not shown to compute the same"


def is_foreign(path: Path) -> bool:
    """Whether a path names an ONNX file that this package did not write."""
    found = find_artifact(path)
    if found is None or found.kind is not ArtifactKind.ONNX or found.path.suffix != ".onnx":
        return False
    return check_model(found.path).metadata.get(ONNX_METADATA_KEY) is None


def read_foreign(path: Path) -> Graph:
    """The graph of such a file.

    Raises:
        UserInputError: it is not an ONNX model, or has tensors of other types.
    """
    found = find_artifact(path)
    assert found is not None
    model = load_model(found.path)
    nothing = OnnxMetadata(
        version="", target=_OTHERS, stage="", history=(), signature={}, layers=(), site_values={}
    )
    graph = graph_of(model, nothing, found.path)
    graph.shapes = {
        each.name: tuple(d.dim_param or int(d.dim_value) for d in each.type.tensor_type.shape.dim)
        for each in model.graph.input
    }
    return graph


def keeps_cache(graph: Graph) -> bool:
    """Whether a file has a key-value cache among its inputs."""
    return any(name.startswith(PAST) for name, _ in graph.inputs.values())


def prove_foreign(program: Program, candidate: Graph, folder: Path) -> Certificate:
    """Prove a captured program and a file of another program equal.

    Args:
        program: Captured from the model, with a cache if the file has one; in float32.
        candidate: The file, by `read_foreign`. It is changed.
        folder: The model's folder, for messages.

    Returns:
        The certificate. Its conditions say what the file takes for granted of its inputs, and how
        far its codes are from the program's weights, if it has codes.

    Raises:
        UserInputError: inputs or outputs of the file have no counterpart.
    """
    reference = program_graph(program)
    reference.label = f"{folder}, as captured"
    notes = _aligned(reference, candidate)
    lookups = any(node.op == LOOKUP for node in candidate.nodes.values())
    ones = products_of(reference, lookups=lookups)
    others = products_of(candidate, lookups=True)
    found = matched(ones, others)
    extra = _unmatched(ones, others, found) + _of_codes(found)
    pairs = _pairs(reference, candidate, found)
    assume((reference, candidate))
    structure = compare_structure(reference, candidate, pairs)
    # Another exporter writes the same in other nodes, so nodes that differ are no difference yet.
    segments = [
        dataclasses.replace(s, status=OPEN, problem=s.problem or _OTHER_NODES)
        if s.status == DIFFERENT
        else s
        for s in structure.segments
    ]
    structure = Structure(structure.pairs, (*segments, *extra), (*structure.notes, *notes))
    codes = {pair.site.name for pair, one in zip(pairs, found, strict=True) if one.other.coded}
    sites = [prove_site(pair) for pair in structure.pairs]
    sites = [
        dataclasses.replace(s, status=PROVED) if s.name in codes and not s.problem else s
        for s in sites
    ]
    where = Path(candidate.label)
    files = onnx_files(where, candidate.extra)
    file = GraphRecord(where.name, candidate.dialect, _OTHERS, str(where), files, tensors=None)
    records = record_of(program, reference, None), file
    return certificate_of(records, structure, sites, structure.segments, 0)


def _aligned(one: Graph, other: Graph) -> list[str]:
    """Check the inputs, and give outputs the names that the program has for them.

    Raises:
        UserInputError: an input or output has no counterpart, or a cache another layout.
    """
    known = {name for name, _ in one.inputs.values()}
    there = {name for name, _ in other.inputs.values()}
    optional = {"position_ids", TYPES}
    if (known ^ there) - optional:
        raise UserInputError(
            f"the file has inputs {', '.join(sorted(there - known)) or 'all'} that the model as "
            f"captured has not, and lacks {', '.join(sorted(known - there)) or 'none'}",
            where=other.label,
            hint="export the model with its usual inputs; a decoder with its cache",
        )
    for name, shape in other.shapes.items():
        wanted = one.shapes.get(name, shape)
        pairs = zip(shape, wanted, strict=False)
        fixed = (a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
        if len(shape) != len(wanted) or any(fixed):
            raise UserInputError(
                f"the input {name} has the shape {list(shape)} in the file, and {list(wanted)} in "
                "the model as captured",
                where=other.label,
                hint="a cache has to be laid out as [batch, heads, positions, size]",
            )
    other.shapes = {}
    return _same_outputs(one, other)


def _same_outputs(one: Graph, other: Graph) -> list[str]:
    if not one.outputs.keys() & other.outputs.keys():
        if len(one.outputs) < len(other.outputs):
            raise UserInputError(
                f"none of the file's outputs {', '.join(other.outputs)} has the name of one of the "
                f"model's: {', '.join(one.outputs)}",
                where=other.label,
                hint="name them in the export",
            )
        pairs = list(zip(one.outputs, other.outputs, strict=False))
        other.outputs = {name: other.outputs[old] for name, old in pairs}
        note = "outputs are matched by their order: "
        return [note + ", ".join(f"{old} is {name}" for name, old in pairs)]
    missing = [name for name in one.outputs if name not in other.outputs]
    one.outputs = {name: v for name, v in one.outputs.items() if name in other.outputs}
    return [f"not compared, since the file has it not: {name}" for name in missing]


def _pairs(one: Graph, other: Graph, found: list[Matched]) -> list[Pair]:
    """The layers of both graphs, whose values are leaves of the comparison."""
    sizes = [m.one.n for m in found]
    values = _cut(one, [m.one for m in found], sizes), _cut(other, [m.other for m in found], sizes)
    pairs, taken = [], dict[str, int]()
    for place, m in enumerate(found):
        path = m.one.name.removesuffix(".weight")
        taken[path] = taken.get(path, 0) + 1
        name = path if taken[path] == 1 else f"{path}#{taken[path]}"
        site = SiteRow(name, path, m.one.k, m.one.n, "float32")
        for graph, names in zip((one, other), values, strict=True):
            graph.sites[name], graph.site_values[name] = site, names[place]
        maps = _linear(m.one, m.one.rows, m), _linear(m.other, m.rows, m)
        pairs.append(Pair(site, maps))
    return pairs


def _cut(graph: Graph, products: list[Product], sizes_of: list[int]) -> list[str]:
    """The value of each product; those of one operator are parts of it."""
    groups: dict[str, list[int]] = {}
    for place, product in enumerate(products):
        groups.setdefault(product.value, []).append(place)
    names = dict[int, str]()
    for places in groups.values():
        sizes = [sizes_of[place] for place in places]
        names |= zip(places, cut_into(graph, products[places[0]], sizes), strict=True)
    return [names[place] for place in range(len(products))]


def _linear(product: Product, rows: Any, pair: Matched) -> Linear:
    def wide(part: slice, _: int) -> Rows:
        values = rows(part)
        return Rows(values, abs(values), values * 0)

    return Linear((product.x,), pair.one.n, pair.one.k, wide)


def _of_codes(found: list[Matched]) -> list[Segment]:
    """The condition that codes stand for the weights of the program, and rows that do not."""
    coded = [m for m in found if m.other.coded]
    if not coded:
        return []
    worst = max(coded, key=lambda m: m.distance)
    text = (
        f"the weights of {len(coded)} layers are those that the file's codes stand for, which "
        f"differ from the model's by at most {worst.distance:.3g} of their norm (most in "
        f"{worst.one.name})"
    )
    segments = [Segment("weights of codes", PROVED, None, (None, None), conditions=(text,))]
    for m in coded:
        if m.far is not None:
            lines = (m.one.name, f"{m.other.name}, by more than {FARTHEST} of its length")
            segments.append(Segment(f"row {m.far} of {m.one.name}", DIFFERENT, lines, (None, None)))
    return segments


def _unmatched(ones: list[Product], others: list[Product], found: list[Matched]) -> list[Segment]:
    """Layers of the program whose weights the file does not hold."""
    gone = [o for o in ones if not any(m.one is o for m in found)]
    left = [o for o in others if not any(m.other is o for m in found)]
    segments = []
    for one in gone:
        like = next((o for o in left if (o.n, o.k, o.lookup) == (one.n, one.k, one.lookup)), None)
        why = "no layer of the file has its weights"
        if like is None:
            made = Segment(f"weights of {one.name}", OPEN, None, (None, None), problem=why)
        else:
            lines = (one.name, f"{like.name}, whose weights are others")
            made = Segment(f"weights of {one.name}", DIFFERENT, lines, (None, None))
        segments.append(made)
    return segments

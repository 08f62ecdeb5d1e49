"""Drawings of a program's graph: DOT text, and SVG laid out without the program `dot`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.view.outline import INPUT, OUTPUT, Box, outline
from qalora_compile.optional import require

_MOST = 400
"""Most nodes of a drawing: with more, layout takes long and nobody can read it."""
_FILL = {"qalora": "#cfe3f7", INPUT: "#e7e7e7", OUTPUT: "#e7e7e7"}
_PLAIN = "#ffffff"
_LETTER, _LINE, _MARGIN = 6.3, 14, 8
"""Pixels: width of a letter at 10.5 px monospace, height of a line, room around text."""


def to_dot(program: Program, only: str | None = None) -> str:
    """The graph as DOT text, which Graphviz and most graph viewers read.

    Args:
        program: At any stage.
        only: A site or module path, to draw this part alone.

    Raises:
        UserInputError: nothing is at or below `only`.
    """
    lines = ["digraph program {", '  node [shape=box style=filled fontname="monospace"];']
    boxes = outline(program, only)
    for box in boxes:
        label = "\\n".join(_quoted(line) for line in _label(box))
        fill = _FILL.get(box.domain, _PLAIN)
        lines.append(f'  "{box.value.name}" [label="{label}" fillcolor="{fill}"];')
    kinds = {box.value.name: str(box.value) for box in boxes}
    for box in boxes:
        lines += [
            f'  "{source}" -> "{box.value.name}" [label="{_quoted(kinds[source])}"];'
            for source in box.reads
        ]
    return "\n".join([*lines, "}"]) + "\n"


def to_svg(program: Program, only: str | None = None) -> str:
    """The graph as an SVG image, inputs at the top, laid out in layers by grandalf (Sugiyama).

    Args, Raises: see `to_dot`.

    Raises:
        UserInputError: the graph has more than 400 nodes, too many to be read.
        UnsupportedError: grandalf is not installed.
    """
    boxes = outline(program, only)
    if len(boxes) > _MOST:
        raise UserInputError(
            f"the graph has {len(boxes)} nodes; a drawing of more than {_MOST} cannot be read",
            hint="draw one part: inspect --only PATH (only=…), for example --only model.layers.0; "
            "or write DOT or Netron's form",
        )
    layout = _Layout(boxes)
    width, height = layout.size
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="monospace" font-size="10.5">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for points, kind in layout.edges:
        path = " L ".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(
            f'<path d="M {path}" fill="none" stroke="#888"><title>{escape(kind)}</title></path>'
        )
    for box, (x, y), (w, h) in layout.boxes:
        fill = _FILL.get(box.domain, _PLAIN)
        parts.append(
            f'<g><title>{escape(_details(box))}</title><rect x="{x:.1f}" y="{y:.1f}" '
            f'width="{w:.1f}" height="{h:.1f}" rx="3" fill="{fill}" stroke="#444"/>'
        )
        for index, line in enumerate(_label(box)):
            at = y + _MARGIN / 2 + _LINE * (index + 0.75)
            parts.append(f'<text x="{x + _MARGIN:.1f}" y="{at:.1f}">{escape(line)}</text>')
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Size:
    """The view of a box or an edge for grandalf, which sets its place."""

    def __init__(self, w: float = 0.0, h: float = 0.0) -> None:
        self.w, self.h = w, h
        self.xy = (0.0, 0.0)
        self.points: Sequence[tuple[float, float]] = ()

    def setpath(self, points: Sequence[tuple[float, float]]) -> None:
        self.points = points


class _Layout:
    """Places of boxes and paths of edges, in pixels from the upper left."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        graphs = require("grandalf.graphs", extra="report", purpose="lay out a graph")
        new_vertex, new_edge = map(_in_fixed_order, (graphs.Vertex, graphs.Edge))
        vertices: dict[str, Any] = {box.value.name: new_vertex(box) for box in boxes}
        for number, vertex in enumerate(vertices.values()):
            vertex.number = number
            lines = _label(vertex.data)
            wide = max(map(len, lines)) * _LETTER + 2 * _MARGIN
            vertex.view = _Size(wide, len(lines) * _LINE + _MARGIN)
        pairs = dict.fromkeys((s, box.value.name) for box in boxes for s in box.reads)
        edges = {(a, b): new_edge(vertices[a], vertices[b]) for a, b in pairs}
        for number, edge in enumerate(edges.values()):
            edge.number, edge.view = number, _Size()
        parts = graphs.Graph(list(vertices.values()), list(edges.values())).C
        self.size: tuple[float, float] = (_MARGIN, _MARGIN)
        shifts = {id(v): shift for part in parts for shift in [self._place(part)] for v in part.sV}
        self.boxes: list[tuple[Box, tuple[float, float], tuple[float, float]]] = []
        self.edges: list[tuple[list[tuple[float, float]], str]] = []
        for box in boxes:
            vertex = vertices[box.value.name]
            size, (dx, dy) = vertex.view, shifts[id(vertex)]
            corner = (size.xy[0] - size.w / 2 + dx, size.xy[1] - size.h / 2 + dy)
            self.boxes.append((box, corner, (size.w, size.h)))
        kinds = {box.value.name: str(box.value) for box in boxes}
        for (source, _), edge in edges.items():
            dx, dy = shifts[id(vertices[source])]
            self.edges.append(([(x + dx, y + dy) for x, y in edge.view.points], kinds[source]))

    def _place(self, part: Any) -> tuple[float, float]:
        """Lay out a connected part to the right of the last one; return the shift of its places."""
        layouts = require("grandalf.layouts", extra="report", purpose="lay out a graph")
        layout = layouts.SugiyamaLayout(part)
        layout.xspace, layout.yspace = 14, 22
        layout.init_all(roots=[v for v in part.sV if not v.e_in()], optimize=True)
        layout.draw(3)
        views = [v.view for v in part.sV]
        across = [x for view in views for x in (view.xy[0] - view.w / 2, view.xy[0] + view.w / 2)]
        across += [x for edge in part.sE for x, _ in edge.view.points]
        down = [y for view in views for y in (view.xy[1] - view.h / 2, view.xy[1] + view.h / 2)]
        shift = (self.size[0] - min(across), _MARGIN - min(down))
        width, height = max(across) + shift[0] + _MARGIN, max(down) + shift[1] + _MARGIN
        self.size = (width, max(self.size[1], height))
        return shift


def _in_fixed_order(kind: type[Any]) -> type[Any]:
    """A class of grandalf whose objects are hashed by their `number`.

    grandalf iterates over sets of vertices and edges. Hashed by address, as objects are by default,
    the same graph would be drawn differently each time.
    """
    return type(kind.__name__, (kind,), {"__hash__": lambda self: self.number})


def _label(box: Box) -> list[str]:
    if box.domain in (INPUT, OUTPUT):
        name = box.value.name if box.domain == INPUT else box.op
        return [f"{box.domain} {name}", str(box.value)]
    name = box.op if box.domain == "aten" else f"{box.domain}.{box.op}"
    return [name, *([box.path] if box.path else []), str(box.value)]


def _details(box: Box) -> str:
    return "\n".join(f"{name}: {text}" for name, text in (*box.stored, *box.options)) or box.op


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

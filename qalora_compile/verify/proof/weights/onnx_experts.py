"""Experts in exported models: slices of the rows, a layer for each, and a Concat of the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qalora_compile.verify.proof.graphs.graph import Graph, Node, Tensor
from qalora_compile.verify.proof.weights.linear_map import Linear, NotLinearError, Reading, Rows


def expert_linear(graph: Graph, node: Node, linear: Callable[[Any], Linear]) -> Linear:
    """The linear maps of all experts, from the Concat of their rows.

    Args:
        graph: The model.
        node: The Concat.
        linear: Reads one expert's value as a linear map; see `expert_rows` for its source.

    Raises:
        NotLinearError: the slices do not lie one behind the other, or read different tensors.
    """
    if node.options.get("axis") != 0:
        raise NotLinearError(f"the rows of experts are not joined: {node.line}")
    *values, last = node.args
    apart = graph.node(last)
    if apart is not None and apart.op == "onnx.Unsqueeze":
        parts = [linear(_unsqueezed(graph, value)) for value in node.args]
        source = _numbered(parts)
    else:
        parts = [linear(value) for value in values]
        source = _sliced(graph, parts)
        _check_filler(graph, last, source[0], parts[-1])
    kinds = {(part.n, part.k, part.experts) for part in parts}
    if len(kinds) != 1 or any(part.bias for part in parts):
        raise NotLinearError(f"the experts differ in kind, or add vectors: {node.line}")

    def rows(part: slice, expert: int) -> Rows:
        return parts[expert].rows(part, -1)

    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return dataclasses.replace(
        parts[0],
        source=source,
        rows=rows,
        experts=len(parts),
        notes=notes,
        terms=max(part.terms for part in parts),
    )


def expert_rows(graph: Graph, node: Node, read: Callable[[Any], Reading]) -> Reading | None:
    """One expert's rows of a tensor: its source is the tensor, start and end, or its number."""
    if node.op == "onnx.Gather" and node.options.get("axis", 0) == 0:
        number = _stored_integer(graph, node["indices"])
        inner = read(node["data"])
        if number is None or not inner.source:
            return None
        return dataclasses.replace(inner, source=(*inner.source, number))
    if node.op != "onnx.Slice":
        return None
    value, start, end = _slice_of(graph, node)
    inner = read(value)
    return dataclasses.replace(inner, source=(*inner.source, start, end))


def _numbered(parts: list[Linear]) -> tuple[Any, ...]:
    """X of experts that have `x[e]` each."""
    x, *_ = parts[0].source
    if [part.source for part in parts] != [(x, place) for place in range(len(parts))]:
        raise NotLinearError("an expert does not read its own matrix")
    return (x,)


def _sliced(graph: Graph, parts: list[Linear]) -> tuple[Any, ...]:
    """X and the offsets of experts that have one slice of rows behind the other."""
    if any(len(part.source) != len(("x", "start", "end")) for part in parts):
        raise NotLinearError("an expert reads no slice of rows")
    x, _, end = parts[0].source
    offsets, _ = _offset(graph, end)
    before: Any = None
    for place, part in enumerate(parts):
        rows, start, end = part.source
        first = _stored_integer(graph, start) == 0 if before is None else start == before
        if rows != x or not first or _offset(graph, end) != (offsets, place):
            raise NotLinearError("the slices of experts do not follow each other")
        before = end
    return x, offsets


def _check_filler(graph: Graph, operand: Any, x: Any, last: Linear) -> None:
    """Check that the last value is zeros for the rows behind those of the last expert."""
    node = graph.node(operand)
    if node is not None and node.op in ("onnx.Cast", "onnx.CastLike"):
        node = _first(graph, node)
    zeros = node is not None and node.op == "onnx.ConstantOfShape" and not node.options
    size = _first(graph, node) if zeros else None
    rows = _first(graph, size, "onnx.Concat")
    shape = _first(graph, rows, "onnx.Sub")
    if size is not None and rows is not None and shape is not None:
        (_, *widths), (_, taken), (*_, end) = size.args, rows.args, last.source
        of_x = (shape.op, shape.args) == ("onnx.Shape", (x,))
        lead = (shape.options.get("start", 0), shape.options.get("end")) == (0, 1)
        if (
            of_x
            and lead
            and taken == end
            and [_stored_integer(graph, w) for w in widths] == [last.n]
        ):
            return
    raise NotLinearError(f"no rows of zeros follow those of the last expert: {operand}")


def _first(graph: Graph, node: Node | None, op: str = "") -> Node | None:
    """The node that computes the first operand of a node, if that is of this operator."""
    if node is None or (op and node.op != op):
        return None
    operand, *_ = node.args
    return graph.node(operand)


def _unsqueezed(graph: Graph, operand: Any) -> Any:
    node = graph.node(operand)
    value, axes = (None, None) if node is None or node.op != "onnx.Unsqueeze" else node.args
    if _stored_integer(graph, axes) != 0:
        raise NotLinearError(f"the experts are not joined along their axis: {graph.line(operand)}")
    return value


def _slice_of(graph: Graph, node: Node | None) -> tuple[Any, Any, Any]:
    """The tensor, start and end of a slice of rows."""
    if node is None or node.op != "onnx.Slice":
        raise NotLinearError("an expert reads no slice of rows")
    value, start, end, axes, *steps = node.args
    if _stored_integer(graph, axes) != 0 or any(_stored_integer(graph, s) != 1 for s in steps):
        raise NotLinearError(f"an expert reads no slice of rows: {node.line}")
    return value, start, end


def _offset(graph: Graph, operand: Any) -> tuple[Any, int]:
    """The vector of offsets, and the place in it."""
    value, start, end = _slice_of(graph, graph.node(operand))
    first, last = _stored_integer(graph, start), _stored_integer(graph, end)
    if first is None or last is None or first < 0 or last != first + 1:
        raise NotLinearError(f"a slice of rows ends at no offset: {graph.line(operand)}")
    return value, first


def _stored_integer(graph: Graph, operand: Any) -> int | None:
    """A stored tensor of one integer."""
    if not isinstance(operand, Tensor):
        return None
    stored = graph.tensors[operand.name]
    return int(stored.values().reshape(-1)[0]) if stored.size == 1 else None

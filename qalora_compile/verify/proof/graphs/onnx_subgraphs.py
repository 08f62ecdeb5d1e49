"""Bodies of ONNX nodes (branches of If, the body of Loop) and the values that they capture.

The hash of a body does not depend on names inside it. Values of the surrounding graph that it reads
become operands of its node, so that they are compared like any others.
"""

from __future__ import annotations

import hashlib
from typing import Any

from qalora_compile.verify.proof.graphs.graph import Graph, Node


def body_of(proto: Any) -> tuple[str, list[str]]:
    """The hash of a `GraphProto`, and the names that it captures in reading order."""
    scope = _Scope({}, [])
    text = _graph_text(proto, scope)
    return hashlib.sha256(text.encode()).hexdigest(), scope.captured


def captured(node: Any) -> list[str]:
    """The values of the surrounding graph that the bodies of a `NodeProto` read."""
    found: list[str] = []
    for attribute in node.attribute:
        for body in graphs_of(attribute):
            found += body_of(body)[1]
    return list(dict.fromkeys(found))


def graphs_of(attribute: Any) -> list[Any]:
    """The bodies in an attribute."""
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def subgraphs(graph: Graph, node: Node) -> list[str]:
    """The model-local function of an operator, hashed with the functions that it calls."""
    waiting, seen = [tuple(node.op.rpartition(".")[::2])], set[tuple[str, ...]]()
    hashed = hashlib.sha256()
    while waiting:
        key = waiting.pop()
        proto = graph.functions.get((key[0], key[1]))
        if proto is None or key in seen:
            continue
        seen.add(key)
        hashed.update(proto.SerializeToString(deterministic=True))
        waiting += [(each.domain, each.op_type) for each in proto.node]
    return [f"function {hashed.hexdigest()}"] if seen else []


class _Scope:
    """Names of a body, numbered by order of appearance, nested in the surrounding scope."""

    def __init__(self, names: dict[str, str], captured: list[str]) -> None:
        self.names, self.captured = names, captured

    def inner(self) -> _Scope:
        """The scope of a nested body."""
        return _Scope(dict(self.names), self.captured)

    def made(self, name: str) -> str:
        """A name that the body defines."""
        if name:
            self.names[name] = f"v{len(self.names)}"
        return self.names.get(name, "")

    def read(self, name: str) -> str:
        """A name that the body reads."""
        if not name or name in self.names:
            return self.names.get(name, "")
        if name not in self.captured:
            self.captured.append(name)
        return f"c{self.captured.index(name)}"


def _graph_text(proto: Any, scope: _Scope) -> str:
    lines = [f"in {scope.made(value.name)}" for value in proto.input]
    for tensor in proto.initializer:
        stored = type(tensor)()
        stored.CopyFrom(tensor)
        stored.name = ""
        lines.append(f"{scope.made(tensor.name)} = {_hash(stored)}")
    for node in proto.node:
        read = [scope.read(name) for name in node.input]
        options = [_attribute_text(a, scope) for a in sorted(node.attribute, key=lambda a: a.name)]
        made = [scope.made(name) for name in node.output]
        lines.append(f"{made} = {node.domain}.{node.op_type} {read} {options}")
    lines += [f"out {scope.read(value.name)}" for value in proto.output]
    return "\n".join(lines)


def _attribute_text(attribute: Any, scope: _Scope) -> str:
    inside = [_graph_text(body, scope.inner()) for body in graphs_of(attribute)]
    return f"{attribute.name}: {inside or _hash(attribute)}"


def _hash(proto: Any) -> str:
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()

"""The tensors of a graph's values, from its inputs and the outputs of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qalora_compile.untrusted.element_types import HALVES
from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Ref, refs
from qalora_compile.verify.proof.graphs.graph import Tensor as StoredName
from qalora_compile.verify.proof.graphs.read_onnx import onnx_nodes
from qalora_compile.verify.proof.symbolic import contrib_operators  # noqa: F401, declares operators
from qalora_compile.verify.proof.symbolic.expression import leaf, truth
from qalora_compile.verify.proof.symbolic.fold_constants import FoldedConstants
from qalora_compile.verify.proof.symbolic.fx_operators import ATEN
from qalora_compile.verify.proof.symbolic.onnx_operators import onnx_value
from qalora_compile.verify.proof.symbolic.operators import kind_of, stored
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.tensor import (
    BOOL,
    FLOAT,
    INT,
    Shape,
    Tensor,
    TooShortError,
    UnprovableError,
)
from qalora_compile.verify.proof.weights.onnx_functions import bound

Shapes = Mapping[str, Shape]
NOT_FITTING = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What operands raise that an operator's definition does not have."""


class Unknown:
    """A value without a symbolic form; `why` names the operator at fault."""

    def __init__(self, why: str, *, short: bool = False) -> None:
        self.why, self.short = why, short


class Evaluation:
    """Values of one graph.

    Args:
        graph: The graph.
        shapes: Shapes of the inputs, by name.
        sites: Value → the name of the site that it is the output of, the operand that the site
            reads, and the shape [N, K] of its weight.
        halves: Values in half precision count as float32, because the other graph computes in it.
    """

    def __init__(
        self,
        graph: Graph,
        shapes: Shapes,
        sites: Mapping[str, tuple[str, Any, int, int]],
        *,
        halves: bool,
    ) -> None:
        self._graph, self._sites, self._halves = graph, sites, halves
        self._made: dict[str, Any] = {}
        self._folded = FoldedConstants(graph)
        for value, (name, dtype) in graph.inputs.items():
            self._made[value] = self._input(name, dtype, shapes)
        for value, make in graph.given.items():
            self._made[value] = make(shapes)

    def of(self, operand: Any) -> Tensor:
        """The tensor of an operand.

        Raises:
            TooShortError: it would have one if axes had more elements.
            UnprovableError: it has no symbolic form.
        """
        found = self._operand(operand)
        if not isinstance(found, Tensor):
            raise UnprovableError("a value that is no tensor")
        return found

    def _input(self, name: str, dtype: str | None, shapes: Shapes) -> Tensor | Unknown:
        try:
            kept = self._widened(dtype)
            return _leaf(f"input {name}: {kept}", shapes[name], kind_of(kept))
        except (KeyError, UnprovableError) as error:
            return Unknown(f"input {name}: {error}")

    def _operand(self, operand: Any) -> Any:
        if isinstance(operand, Ref):
            self._make(operand.name)
            found = self._made[operand.name]
            if isinstance(found, Unknown):
                raise (TooShortError if found.short else UnprovableError)(found.why)
            return found
        if isinstance(operand, StoredName):
            return self._constant(operand.name)
        if isinstance(operand, (tuple, list)):
            return tuple(self._operand(item) for item in operand)
        return operand

    def _constant(self, name: str) -> Tensor:
        key = f"@{name}"
        if key not in self._made:
            self._made[key] = stored(self._graph.tensors[name])
        found: Tensor = self._made[key]
        return found

    def _make(self, target: str) -> None:
        """Make a value after those that it is computed from, without recursion."""
        waiting = [target]
        while waiting:
            name = waiting[-1]
            if name in self._made:
                waiting.pop()
                continue
            missing = [n for n in self._needs(name) if n not in self._made]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            self._made[name] = self._value(name)

    def _needs(self, name: str) -> list[str]:
        if name in self._sites:
            return [ref.name for ref in refs(self._sites[name][1])]
        node = self._graph.nodes.get(name)
        if node is None:
            self._made[name] = Unknown(f"nothing computes {name}")
            return []
        return [ref.name for ref in (*refs(node.args), *refs(dict(node.options)))]

    def _value(self, name: str) -> Any:
        node = self._graph.nodes.get(name)
        try:
            if name in self._sites:
                site, source, n, k = self._sites[name]
                read = self.of(source)
                looked_up = read.dtype == INT  # token ids, each of which gives a row of the table
                lead, width = (read.shape, k) if looked_up else (read.shape[:-1], n)
                return _leaf(f"site {site}", (*lead, as_poly(width)), FLOAT)
            assert node is not None
            return self._node(node)
        except UnprovableError as error:
            return Unknown(f"{error}", short=isinstance(error, TooShortError))
        except NOT_FITTING as error:
            return Unknown(f"{node.line if node else name}: {error!r}")

    def _node(self, node: Node) -> Any:
        folded = self._folded.of(node)
        if folded is not None:
            return stored(folded)
        args = [self._widened(self._operand(arg)) for arg in node.args]
        options = {n: self._widened(self._operand(value)) for n, value in node.options.items()}
        try:
            if self._graph.dialect == FX:
                return ATEN.value(node.op, args, options)
            results = self._onnx(node, args, options)
        except UnprovableError as error:
            raise type(error)(f"{node.line}: {error}") from error
        return results[node.output] if isinstance(results, tuple) else results

    def _widened(self, operand: Any) -> Any:
        """A dtype in half precision as float32, if the graphs differ in that."""
        return (
            "float32"
            if self._halves and isinstance(operand, str) and operand in HALVES
            else operand
        )

    def _onnx(self, node: Node, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        domain, _, name = node.op.rpartition(".")
        body = self._graph.functions.get((domain, name))
        if body is None or domain == "onnx":
            return onnx_value(node.op, args, options)
        return function_value(body, args, options)


def function_value(body: Any, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The results of a model-local function, whose operators have to be standard ones.

    Raises:
        UnprovableError: an operator in it has no symbolic form.
    """
    values: dict[str, Any] = dict(zip(body.input, args, strict=False))
    for name in list(body.input)[len(args) :]:
        values[name] = None
    for proto in body.node:
        for node in onnx_nodes(bound(proto, dict(options)), set()):
            given = [None if a is None else values[a.name] for a in node.args]
            found = onnx_value(node.op, given, node.options)
            values[node.name] = found[node.output] if isinstance(found, tuple) else found
    return tuple(values[name] for name in body.output)


def _leaf(name: str, shape: Sequence[Poly], kind: str) -> Tensor:
    def element(index: Sequence[Poly]) -> Any:
        found = leaf(name, index)
        return truth(found) if kind == BOOL else found

    return Tensor(tuple(shape), kind, element)

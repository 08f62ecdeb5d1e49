"""Model-local functions of an exported model, evaluated on the constants of one node.

The part of a function that depends only on weights is evaluated by `onnx.reference`, in the
function's precision; the part that depends on the node's input remains as nodes for `onnx_layers`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from qalora_compile.optional import require
from qalora_compile.verify.proof.graphs.graph import ONNX, Graph, Node, Ref
from qalora_compile.verify.proof.graphs.read_onnx import onnx_nodes
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor, from_array
from qalora_compile.verify.proof.weights.linear_map import NotLinearError


class _Split:
    """A function with a node's attributes: the part that depends only on weights, and the rest."""

    def __init__(self, proto: Any, attributes: tuple[tuple[str, Any], ...], dtype: str) -> None:
        onnx = require("onnx", extra="onnx", purpose="read an ONNX model")
        values = dict(attributes)
        self.inputs, self.result = list(proto.input), proto.output[0]
        fixed, rest, known = [], [], set(self.inputs[1:])
        for source in proto.node:
            node = bound(source, values)
            # The type of x is fixed, so casts to it do not depend on its values.
            operands = node.input[:1] if node.op_type == "CastLike" else node.input
            if all(name in known for name in operands if name):
                known |= set(node.output)
                fixed.append(node)
            else:
                rest.append(node)
        read = {name for node in rest for name in node.input} & known
        self.wanted = sorted(read - set(self.inputs[1:]))
        self.rest = [made for node in rest for made in onnx_nodes(node, known)]
        graph = onnx.helper.make_graph(
            fixed,
            "fixed",
            [
                onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None)
                for n in self.inputs
            ],
            [
                onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None)
                for n in self.wanted
            ],
        )
        model = onnx.helper.make_model(graph, opset_imports=list(proto.opset_import))
        self._evaluator = require(
            "onnx.reference", extra="onnx", purpose="evaluate functions"
        ).ReferenceEvaluator(model)
        self._x = np.zeros((1, 1), dtype)

    def evaluate(self, stored: list[StoredTensor]) -> dict[str, StoredTensor]:
        """The constants for the rest, computed from the weights of one node."""
        given = [stored[i].read() for i in range(len(self.inputs) - 1)]
        feed = dict(zip(self.inputs, [self._x, *given], strict=True))
        found = zip(self.wanted, self._evaluator.run(None, feed), strict=True)
        made = {name: from_array(name, np.asarray(values)) for name, values in found}
        return made | dict(zip(self.inputs[1:], stored, strict=True))


Body = tuple[Graph, Ref]
"""A function as a graph, and its result."""


def body_of(graph: Graph, node: Node, stored: list[StoredTensor]) -> Body:
    """The function of a node as a graph, and its result; the graph's `extra` is the name of x.

    Raises:
        NotLinearError: the function cannot be evaluated on these weights.
    """
    domain, _, name = node.op.rpartition(".")
    proto = graph.functions[domain, name]
    attributes = tuple(sorted(node.options.items()))
    split = _split(proto.SerializeToString(), attributes, "float32")
    try:
        tensors = split.evaluate(stored)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise NotLinearError(
            f"the function of {node.op} does not accept the weights: {error}"
        ) from error
    nodes = {made.name: made for made in split.rest}
    body = Graph(ONNX, f"{graph.label}: {node.op}", graph.stage, nodes, {}, {}, tensors, {}, {})
    body.functions, body.extra = graph.functions, split.inputs[0]
    return body, Ref(split.result)


@lru_cache(maxsize=64)
def _split(proto: bytes, attributes: tuple[tuple[str, Any], ...], dtype: str) -> _Split:
    onnx = require("onnx", extra="onnx", purpose="read an ONNX model")
    return _Split(onnx.FunctionProto.FromString(proto), attributes, dtype)


def bound(source: Any, values: dict[str, Any]) -> Any:
    """A node of a function with the values of the caller's attributes in place of references."""
    onnx = require("onnx", extra="onnx", purpose="read an ONNX model")
    node = onnx.NodeProto()
    node.CopyFrom(source)
    kept = []
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            kept.append(attribute)
        elif attribute.ref_attr_name in values:
            made = onnx.helper.make_attribute(attribute.name, values[attribute.ref_attr_name])
            kept.append(made)
    del node.attribute[:]
    node.attribute.extend(kept)
    return node

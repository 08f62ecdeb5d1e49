"""ONNX models of this package as graphs for a proof, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.errors import UserInputError
from qalora_compile.ir.onnx_metadata import OnnxMetadata, explain_metadata, read_onnx_metadata
from qalora_compile.optional import require
from qalora_compile.untrusted.artifacts import ORT_SUFFIX
from qalora_compile.untrusted.element_types import PROGRAM_TYPES
from qalora_compile.verify.proof.graphs.graph import (
    ONNX,
    Graph,
    Node,
    Ref,
    SiteRow,
    Tensor,
    text_of,
)
from qalora_compile.verify.proof.graphs.onnx_subgraphs import body_of, graphs_of
from qalora_compile.verify.proof.graphs.stored_tensor import (
    StoredTensor,
    digest_of,
    from_array,
    from_onnx,
)

_SHOWN = 40
_NUMBERS = ("float32", "int64", "bool")
"""Types of which one element in an attribute is read as a number of Python's like type."""
ONNX_TYPES = {kind.onnx: kind.name for kind in PROGRAM_TYPES}
"""The members of `onnx.TensorProto.DataType` that programs have too."""


def read_onnx_graph(path: Path) -> Graph:
    """The graph of an exported model; large weights stay in their file until they are read.

    Raises:
        UserInputError: the file is missing, is not an ONNX model, is in ONNX Runtime's own format,
            or is not from this package.
    """
    if path.suffix == ORT_SUFFIX:
        raise UserInputError(
            f"{path.name} is in ONNX Runtime's own format, in which the graph is optimized already:"
            " its values and layers are not those of the program",
            where=str(path),
            hint="verify can compare its outputs, without --prove and --numeric; or prove the ONNX "
            "file that it is made from: export --format onnx",
        )
    metadata = read_onnx_metadata(path)
    model = load_model(path)
    with explain_metadata(path):
        return graph_of(model, metadata, path)


def load_model(path: Path) -> Any:
    """The protobuf message of a model, without the weights that lie in other files.

    Raises:
        UserInputError: the file is not an ONNX model.
    """
    onnx = require("onnx", extra="onnx", purpose="read an ONNX model")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own types
        raise UserInputError(f"{path.name} is not an ONNX model", where=str(path)) from error


def graph_of(model: Any, metadata: OnnxMetadata, path: Path) -> Graph:
    """The graph of a loaded model with these metadata."""
    tensors = {p.name: from_onnx(p, path.parent) for p in model.graph.initializer}
    nodes: dict[str, Node] = {}
    for proto in model.graph.node:
        if proto.op_type == "Constant" and not proto.domain:
            tensors[proto.output[0]] = _constant(proto, path.parent)
            continue
        for made in onnx_nodes(proto, set(tensors)):
            nodes[made.name] = made
    inputs = {
        i.name: (i.name, _element_type(i)) for i in model.graph.input if i.name not in tensors
    }
    graph = _graph(model, metadata, path, (nodes, inputs, tensors))
    graph.sites |= {
        row.site: SiteRow(
            row.site, row.weight.rpartition(".")[0], row.k, row.n, "float32", row.experts
        )
        for row in metadata.layers
        if row.bits is not None
    }
    return graph


def _graph(
    model: Any,
    metadata: OnnxMetadata,
    path: Path,
    parts: tuple[dict[str, Node], dict[str, tuple[str, str | None]], dict[str, StoredTensor]],
) -> Graph:
    """The graph without its sites."""
    nodes, inputs, tensors = parts
    return Graph(
        ONNX,
        str(path),
        metadata.target,
        nodes,
        inputs,
        {o.name: _operand(o.name, set(tensors)) for o in model.graph.output},
        tensors,
        {},
        dict(metadata.site_values),
        functions={(f.domain, f.name): f for f in model.functions},
        extra=model,
    )


def onnx_nodes(proto: Any, stored: set[str]) -> list[Node]:
    """The nodes of an `onnx.NodeProto`, one for each of its results.

    A fused Gemm is two: the product, and the function of it.
    """
    if (proto.domain, proto.op_type) == ("com.microsoft", "FusedGemm"):
        return _unfused(proto, stored)
    args = tuple(_operand(name, stored) for name in proto.input)
    options = {a.name: _attribute(a, stored) for a in proto.attribute}
    op = f"{proto.domain or 'onnx'}.{proto.op_type}"
    shown = [text_of(a) for a in args]
    shown += [f"{k}={text_of(v)[:_SHOWN]}" for k, v in sorted(options.items())]
    line = f"{', '.join(proto.output)} = {op}({', '.join(shown)})"
    return [
        Node(name, op, args, options, line, index, proto.name)
        for index, name in enumerate(proto.output)
        if name
    ]


def _unfused(proto: Any, stored: set[str]) -> list[Node]:
    helper = require("onnx", extra="onnx", purpose="read an ONNX model").helper
    given = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
    function = given.pop("activation", b"").decode()
    if function not in ("Relu", "Sigmoid", "Tanh"):
        raise UserInputError(f"FusedGemm with the activation {function!r}")
    inner = f"{proto.output[0]}, before {function}"
    product = helper.make_node("Gemm", list(proto.input), [inner], proto.name, **given)
    outer = helper.make_node(function, [inner], list(proto.output), proto.name)
    return [node for made in (product, outer) for node in onnx_nodes(made, stored)]


def _operand(name: str, stored: set[str]) -> Any:
    if not name:
        return None
    return Tensor(name) if name in stored else Ref(name)


def _attribute(proto: Any, stored: set[str]) -> Any:
    """A plain value, or a hash; for a body, its hash and captured values."""
    inside = [body_of(body) for body in graphs_of(proto)]
    if inside:
        return tuple((f"sha256 {d}", *(_operand(n, stored) for n in names)) for d, names in inside)
    helper = require("onnx", extra="onnx", purpose="read an ONNX model").helper
    value = helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        return tuple(value)
    if type(value).__name__ == "TensorProto":
        held = from_onnx(value, Path())
        if held.size == 1 and held.dtype in _NUMBERS:
            return held.values().reshape(-1)[0].item()
        return f"tensor {from_onnx(value, Path()).digest}"
    return f"sha256 {digest_of(np.frombuffer(proto.SerializeToString(), np.uint8))}"


def _constant(proto: Any, folder: Path) -> StoredTensor:
    attribute = proto.attribute[0]
    if attribute.name == "value":
        found = from_onnx(attribute.t, folder)
        return StoredTensor(proto.output[0], found.dtype, found.shape, found.read)
    kind = np.float32 if "float" in attribute.name else np.int64
    return from_array(proto.output[0], np.asarray(_attribute(attribute, set()), kind))


def _element_type(value: Any) -> str | None:
    return ONNX_TYPES.get(value.type.tensor_type.elem_type, "other")

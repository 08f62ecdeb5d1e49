"""OpenVINO models of this package as graphs for a proof, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.ir.meta import PAST
from qalora_compile.ir.onnx_metadata import OnnxMetadata, explain_metadata
from qalora_compile.ir.openvino_metadata import openvino_metadata, read_openvino
from qalora_compile.verify.proof.graphs.graph import (
    OPENVINO,
    Graph,
    Node,
    Ref,
    SiteRow,
    Tensor,
    text_of,
)
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor

_PRESENT, _BEAMS = "present.", "beam_idx"
CROSS = ".encoder."
"""In the name of a state that keeps what the first step computes from the encoder's states."""
_TYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "boolean": "bool",
    "u2": "uint8",
    "u4": "uint8",
    "u8": "uint8",
}
"""Element types by OpenVINO's names; codes of less than a byte keep their bytes."""
_SHOWN = 40


def read_openvino_graph(path: Path) -> Graph:
    """The graph of an exported model; weights stay in their file until they are read.

    A value is named like the node that computes it. A key-value cache that is state is read as
    inputs and outputs.

    Raises:
        UserInputError: a file is missing or damaged, or is not from this package.
    """
    model = read_openvino(path)
    metadata = openvino_metadata(model, path)
    with explain_metadata(path):
        return _Reader(model, metadata, path).graph


class _Reader:
    def __init__(self, model: Any, metadata: OnnxMetadata, path: Path) -> None:
        self.graph = Graph(
            OPENVINO, str(path), metadata.target, {}, {}, {}, {}, {}, dict(metadata.site_values)
        )
        self.graph.extra = model
        self._states: dict[str, str] = {}
        self._kept: dict[str, Ref | Tensor] = {}
        self.graph.sites |= {
            row.site: SiteRow(row.site, row.weight.rpartition(".")[0], row.k, row.n, "float32")
            for row in metadata.layers
            if row.bits is not None
        }
        for node in model.get_ordered_ops():
            self._read(node)

    def _read(self, node: Any) -> None:
        kind, name, graph = node.get_type_name(), node.get_friendly_name(), self.graph
        if kind == "Constant":
            graph.tensors[name] = stored_constant(name, node)
        elif kind == "Parameter":
            if name != _BEAMS:
                graph.inputs[name] = (name, _type(node))
        elif kind == "ReadValue" and CROSS in node.get_variable_id():
            self._kept[name] = self._operands(node)[0]
        elif kind == "ReadValue":
            past = node.get_variable_id().partition(_PRESENT)[0]
            self._states[name] = past
            graph.inputs[past] = (past, _type(node))
        elif kind == "Assign":
            present = node.get_variable_id().partition(_PRESENT)[0].replace(PAST, _PRESENT)
            graph.outputs[present] = self._operands(node)[0]
        elif kind == "Result":
            graph.outputs[name] = self._operands(node)[0]
        elif not self._reorders_state(node):
            self._add(node, name, kind)

    def _reorders_state(self, node: Any) -> bool:
        """Whether a node takes the rows of a state that `beam_idx` names: a past, as it is read."""
        if node.get_type_name() != "Gather":
            return False
        source = node.input_value(0).get_node().get_friendly_name()
        if source not in self._states:
            return False
        self._states[node.get_friendly_name()] = self._states[source]
        return True

    def _add(self, node: Any, name: str, kind: str) -> None:
        args = tuple(self._operands(node))
        options = {key: _plain(value) for key, value in node.get_attributes().items()}
        shown = [text_of(arg) for arg in args]
        shown += [f"{key}={str(value)[:_SHOWN]}" for key, value in sorted(options.items())]
        line = f"{name} = openvino.{kind}({', '.join(shown)})"
        for index in range(node.get_output_size()):
            value = name if index == 0 else f"{name}:{index}"
            self.graph.nodes[value] = Node(
                value, f"openvino.{kind}", args, options, line, index, name
            )

    def _operands(self, node: Any) -> list[Ref | Tensor]:
        return [self._operand(value) for value in node.input_values()]

    def _operand(self, output: Any) -> Ref | Tensor:
        name, index = output.get_node().get_friendly_name(), output.get_index()
        if name in self._kept:
            return self._kept[name]
        if name in self.graph.tensors:
            return Tensor(name)
        name = self._states.get(name, name)
        return Ref(name if index == 0 else f"{name}:{index}")


def stored_constant(name: str, node: Any) -> StoredTensor:
    """A constant; codes `[N, L, g]` of less than a byte as bytes `[N, L, g · bits / 8]`."""
    kind = node.get_element_type()
    shape = tuple(node.get_output_shape(0))
    dtype = _TYPES.get(kind.get_type_name(), kind.get_type_name())
    if kind.bitwidth < np.dtype(np.uint8).itemsize * 8 and dtype == "uint8":
        shape = (*shape[:-1], shape[-1] * kind.bitwidth // 8)

        def read() -> Any:
            return np.asarray(node.data).reshape(-1).view(np.uint8).reshape(shape)

    else:

        def read() -> Any:
            values = np.asarray(node.data)
            return (values.view(np.uint16) if dtype == "bfloat16" else values).reshape(shape)

    return StoredTensor(name, dtype, shape, read)


def _type(node: Any) -> str | None:
    return _TYPES.get(node.get_output_element_type(0).get_type_name(), "other")


def _plain(value: Any) -> Any:
    """An attribute as numbers and texts."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return str(value)

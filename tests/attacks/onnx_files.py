"""Hostile ONNX files, small, by onnx's own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qalora_compile.ir.meta import ONNX_METADATA_KEY

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


def weight(name: str = "w", shape: tuple[int, ...] = (4, 4)) -> TensorProto:
    """A tensor of ones."""
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def external(location: str, shape: tuple[int, ...] = (4, 4), **more: str) -> TensorProto:
    """A tensor that lies in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(
    tensors: list[TensorProto] | None = None,
    nodes: list[Any] | None = None,
    *,
    functions: list[Any] | None = None,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A product of x with w, unless nodes are given."""
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [X],
        [Y],
        [weight()] if tensors is None else tensors,
    )
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(d, 1) for d in domains)]
    made = helper.make_model(graph, opset_imports=opsets, functions=functions or [], ir_version=9)
    entry = made.metadata_props.add(key=ONNX_METADATA_KEY)
    entry.value = '{"target": "ort", "stage": "x", "history": [], "layers": [], "site_values": {}}'
    return made


def write(made: onnx.ModelProto, folder: Path) -> Path:
    """Write `model.onnx`."""
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path

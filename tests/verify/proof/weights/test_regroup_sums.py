"""Layers whose summands a tool has grouped with others are found, and wrong ones are not proved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.verify.proof.open_graph import open_graph
from qalora_compile.verify.proof.sampled_equality import CutModel
from qalora_compile.verify.proof.weights.regroup_sums import regroup_sums
from tests.models import HIDDEN

TARGETS = ("ort", "ort-stock", "onnx")


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.first(x) + x))


@pytest.fixture(scope="module")
def program() -> qc.Program:
    """A layer in a residual sum, and one more."""
    torch.manual_seed(0)
    captured = qc.capture_model(_Residual().eval(), (torch.randn(2, HIDDEN),))
    return qc.quantize_groups(captured, qc.QuantSpec())


def _regrouped(model: Any) -> Iterator[str]:
    """Move what is added first to what is added last, in each sum of a sum with one reader."""
    nodes = model.graph.node
    made_by = {name: node for node in nodes for name in node.output}
    for place, node in enumerate(list(nodes)):
        inner = made_by.get(node.input[0]) if node.op_type == "Add" else None
        if inner is not None and inner.op_type == "Add":
            one, two = inner.input
            nodes.insert(place, helper.make_node("Add", [two, node.input[1]], [f"joined{place}"]))
            node.input[:] = [one, f"joined{place}"]
            nodes.remove(inner)
            yield node.output[0]


@pytest.mark.parametrize("target", TARGETS)
def test_a_bias_or_correction_added_to_the_residual_is_part_of_the_layer(
    target: str, program: qc.Program, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target=target))
    model = onnx.load(path)
    assert list(_regrouped(model))
    onnx.save(model, path)
    assert qc.prove_equivalence(program, path, samples=0).verdict == "PROVED"
    bias = next(t for t in model.graph.initializer if t.name == "first.bias")
    values = numpy_helper.to_array(bias).copy()
    values[3] = np.nextafter(values[3], np.float32(9))
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    assert qc.prove_equivalence(program, path, samples=0).verdict == "DIFFERENT"


def test_a_layer_whose_value_the_file_lacks_is_not_run(program: qc.Program, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target="ort"))
    model = onnx.load(path)
    list(_regrouped(model))
    onnx.save(model, path)
    graph = open_graph(path)
    regroup_sums(graph)
    with pytest.raises(UserInputError, match="does not compute this layer alone"):
        CutModel(graph, ["first"], list(graph.outputs.values()))

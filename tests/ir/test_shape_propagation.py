"""Shapes are propagated through a graph, each kind of layer once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.ir import shape_propagation
from qalora_compile.ir.shape_propagation import propagate
from tests.models import bert, gpt2, llama, token_ids


class Constants(nn.Module):
    """Calls that differ in the type of a constant alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Whole numbers and what becomes of them."""
        same = [x + 1, x + 1.0, x + True, x * 1, x * 1.0]
        return *same, x.to(torch.int32), x.to(torch.int64), x[:, 1:3], x[:, 1:4], x[:, 1:3]


def recorded(program: qc.Program) -> list[tuple[str, str]]:
    graph = program.copy_graph()
    tensors = program.tensors()
    stored = {n: t for n in graph.nodes if (t := tensors.get(str(n.target))) is not None}
    names = propagate(graph, program, stored)
    return [_facts(node, names) for node in graph.nodes if "val" in node.meta]


def _facts(node: fx.Node, names: dict[str, str]) -> tuple[str, str]:
    value = node.meta["val"]
    parts: tuple[object, ...] = (value,)
    if isinstance(value, Tensor):
        parts = value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
    text = str(parts)
    for symbol, name in names.items():  # their numbers differ from run to run
        text = text.replace(symbol, name)
    return node.name, text


@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_values_that_are_shared_are_those_that_each_node_computes(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_ids(2, 12)
    program = qc.quantize_groups(qc.capture_model(build(), (ids,)))
    shared = recorded(program)
    monkeypatch.setattr(shape_propagation, "_facts", lambda *_: object())  # equal to nothing
    assert shared == recorded(program)
    assert any("batch" in text for _, text in shared)


def test_the_type_of_a_constant_counts() -> None:
    program = qc.capture_model(Constants(), (torch.ones(2, 5, dtype=torch.int64),))
    found = program(torch.ones(3, 5, dtype=torch.int64))
    texts = dict(recorded(program))
    (output,) = program.graph.find_nodes(op="output")
    nodes = output.all_input_nodes
    kinds = [texts[node.name].split(",")[0] for node in nodes]
    assert kinds == [f"({value.dtype}" for value in dict.fromkeys(found)]
    assert len(set(kinds)) == 3


def test_a_second_layer_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    layout = shape_propagation._layout

    def counting(tensor: Tensor) -> Hashable:
        made.append(tensor)
        return layout(tensor)

    monkeypatch.setattr(shape_propagation, "_layout", counting)
    counts = []
    for layers in (2, 5):
        program = qc.capture_model(llama(num_hidden_layers=layers), (token_ids(2, 12),))
        made.clear()
        recorded(program)
        stored = len(program.tensors())
        counts.append(len(made) - stored)
    assert counts[0] == counts[1]

"""Runs of a graph in which nodes are watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.interpret import WatchingInterpreter


def make_module() -> fx.GraphModule:
    """(x + 1) · 2, then − 3, in nodes `add`, `mul` and `sub`."""

    def forward(x: Tensor) -> Tensor:
        return (x + 1) * 2 - 3

    return fx.symbolic_trace(forward)


def test_a_run_ends_after_the_last_watched_node() -> None:
    computed: list[str] = []

    class Listing(WatchingInterpreter):
        def compute(self, node: fx.Node) -> Any:
            computed.append(node.name)
            return super().compute(node)

    run = Listing(make_module(), ["mul", "add", "no_such_node"])
    assert run.run_leaves([torch.tensor(1.0)]) is None
    assert computed == ["x", "add", "mul"]
    assert {name: float(value) for name, value in run.values.items()} == {"add": 2.0, "mul": 4.0}


def test_without_names_the_outputs_are_computed() -> None:
    assert float(WatchingInterpreter(make_module()).run_leaves([torch.tensor(1.0)])) == 1.0


def test_with_no_name_nothing_is_computed() -> None:
    assert WatchingInterpreter(make_module(), []).run_leaves([None]) is None


def test_what_is_watched_can_be_replaced() -> None:
    class Negating(WatchingInterpreter):
        def watch(self, node: fx.Node, value: Any) -> Any:
            return super().watch(node, -value)

    run = Negating(make_module(), ["add", "output"])
    run.run_leaves([torch.tensor(1.0)])
    assert {name: float(value) for name, value in run.values.items()} == {
        "add": -2.0,
        "output": 7.0,
    }

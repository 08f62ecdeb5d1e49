"""Writes into fresh values become new values; writes that others see stay."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qalora_compile.ir.out_of_place import write_out_of_place

ATEN = torch.ops.aten


def graph_of(*calls: tuple[Any, ...]) -> fx.Graph:
    """A graph of calls on x; a number stands for the result of an earlier one, 0 for x."""
    graph = fx.Graph()
    values: list[Any] = [graph.placeholder("x")]
    for target, *args in calls:
        found = [values[a] if isinstance(a, int) else a for a in args]
        values.append(graph.call_function(target, tuple(found)))
    graph.output(values[-1])
    return graph


def targets(graph: fx.Graph) -> list[str]:
    """The operators, in order."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def run(graph: fx.Graph, x: Tensor) -> Tensor:
    result: Tensor = fx.GraphModule(nn.Module(), graph)(x.clone())
    return result


def test_a_fresh_value_is_not_written_and_later_readers_read_the_result() -> None:
    graph = graph_of(
        (ATEN.add.Tensor, 0, 0),
        (ATEN.exp.default, 1),  # reads the value before it is written
        (ATEN.mul_.Tensor, 1, 0),
        (ATEN.add_.Tensor, 3, 2),  # writes what the write returned
        (ATEN.sub.Tensor, 1, 2),  # reads it by its old name
    )
    x = torch.randn(3)
    before = run(graph, x)
    assert len(write_out_of_place(graph)) == 2
    assert targets(graph)[2:4] == ["aten.mul.Tensor", "aten.add.Tensor"]
    torch.testing.assert_close(run(graph, x), before, rtol=0, atol=0)


def test_inputs_and_what_a_view_shares_are_left() -> None:
    for calls in (
        [(ATEN.add_.Tensor, 0, 0)],
        [(ATEN.view.default, 0, [-1]), (ATEN.exp_.default, 1)],
        [(ATEN.exp.default, 0), (ATEN.view.default, 1, [-1]), (ATEN.exp_.default, 1)],
        [(ATEN.dropout.default, 0, 0.1, False), (ATEN.exp_.default, 1)],  # may be its operand
    ):
        graph = graph_of(*calls)
        before = targets(graph)
        assert write_out_of_place(graph) == [] and targets(graph) == before


def test_a_result_of_several_is_a_value_of_its_own() -> None:
    calls: list[tuple[Any, ...]] = [
        (ATEN.topk.default, 0, "k"),
        (operator.getitem, 1, "first"),
        (ATEN.exp_.default, 2),
    ]
    graph = graph_of(*calls)
    for node in graph.nodes:  # numbers, which stand for results in `graph_of`
        node.args = tuple({"k": 2, "first": 0}.get(a, a) for a in node.args)
    x = torch.randn(3)
    before = run(graph, x)
    assert len(write_out_of_place(graph)) == 1
    torch.testing.assert_close(run(graph, x), before, rtol=0, atol=0)
    twice = graph_of(
        *calls[:2], (operator.getitem, 1, "first"), *calls[2:], (ATEN.add.Tensor, 3, 4)
    )
    assert write_out_of_place(twice) == []


def test_an_operator_without_a_counterpart_is_left() -> None:
    graph = graph_of((ATEN.exp.default, 0), (ATEN.zero_.default, 1))
    write_out_of_place(graph)
    assert targets(graph)[1] in ("aten.zero_.default", "aten.zero.default")
    graph = graph_of((ATEN.exp.default, 0), (ATEN.uniform_.default, 1))
    write_out_of_place(graph)
    torch.testing.assert_close(run(graph, torch.zeros(2)) < 1, torch.tensor([True, True]))

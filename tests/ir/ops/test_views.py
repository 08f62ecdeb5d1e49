"""Views of operator nodes, and arguments by name."""

from __future__ import annotations

import dataclasses
import importlib
import operator
import pkgutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from qalora_compile.errors import InternalError
from qalora_compile.ir import ops
from qalora_compile.ir.ops.linear import GroupLinear, GroupSum, PooledAdapter, group_sum
from qalora_compile.ir.ops.views import (
    VIEWS,
    OperatorView,
    argument,
    arguments,
    output_value,
    set_argument,
    view_of,
)

ATEN = torch.ops.aten
IN_KERNELS = ("_grad", "_grads", "moved_codes")
"""Ends of the names of operators that kernels and folding alone call: no graph holds them."""
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=lambda view: view.__name__)


def own_operators() -> set[Any]:
    """Every operator that a file of `ir/ops` defines."""
    modules = [
        importlib.import_module(f"{ops.__name__}.{m.name}")
        for m in pkgutil.iter_modules(ops.__path__)
    ]
    values = [value for module in modules for value in vars(module).values()]
    return {value._opoverload for value in values if hasattr(value, "_opoverload")}


def example(view: type[OperatorView], graph: fx.Graph) -> OperatorView:
    """A view with operands of the types that its fields name."""
    node = graph.placeholder("value")
    values: dict[str, Any] = {
        "fx.Node": node,
        "fx.Node | None": None,
        "Sequence[fx.Node]": [node, node],
        "int": 4,
        "float": 0.5,
        "str": "fp32",
        "torch.dtype": torch.float32,
    }
    return view(**{field.name: values[str(field.type)] for field in dataclasses.fields(view)})


def test_every_operator_of_graphs_has_a_view() -> None:
    in_graphs = {target for target in own_operators() if not target._opname.endswith(IN_KERNELS)}
    assert set(VIEWS) == in_graphs


@every_view
def test_the_fields_are_the_arguments_of_the_schema(view: type[OperatorView]) -> None:
    names = [field.name for field in dataclasses.fields(view)]
    assert names == [argument.name for argument in view.target._schema.arguments]
    assert view.target._opname == "_".join(_words(view.__name__))


def _words(name: str) -> list[str]:
    name = name.replace("NBits", "Nbits")
    starts = [at for at, letter in enumerate(name) if letter.isupper()]
    return [name[a:b].lower() for a, b in zip(starts, [*starts[1:], None], strict=True)]


@every_view
def test_what_is_created_is_read_back(view: type[OperatorView]) -> None:
    graph = fx.Graph()
    made = example(view, graph)
    node = made.insert(graph)
    assert view.of(node) == made
    assert (node.target, len(node.args), node.kwargs) == (
        view.target,
        len(dataclasses.fields(view)),
        {},
    )
    assert list(view.all_in(graph)) == [(node, made)]


@every_view
def test_operands_given_by_name_are_read_too(view: type[OperatorView]) -> None:
    graph = fx.Graph()
    made = example(view, graph)
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(view)}
    assert view.of(graph.call_function(view.target, (), values)) == made


def test_a_view_of_another_operator_is_refused() -> None:
    graph = fx.Graph()
    node = GroupSum.create(graph, graph.placeholder("x"), 32)
    with pytest.raises(
        InternalError, match=r"qalora\.group_sum\.default is not qalora\.group_line"
    ):
        GroupLinear.of(node)


@pytest.mark.parametrize(("operand", "value"), [("lora_A", 1.0), ("scaling", None)])
def test_an_operand_of_another_type_is_refused(operand: str, value: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = PooledAdapter.create(graph, x, x, x, 2.0)
    set_argument(node, operand, value)
    with pytest.raises(InternalError, match=f"operand {operand} of qalora.pooled_adapter"):
        PooledAdapter.of(node)


def test_a_view_whose_fields_are_not_the_schema_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrong(OperatorView):
        x: fx.Node
        width: int

    with pytest.raises(InternalError, match="Wrong has the fields"):
        view_of(group_sum)(Wrong)
    assert VIEWS[group_sum._opoverload] is GroupSum


@given(given=st.integers(2, 5), named=st.booleans())
def test_an_argument_is_the_same_however_it_is_given(given: int, named: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    values = {"self": x, "dim": 1, "start": 2, "end": 9, "step": 3}
    defaults = {"dim": 0, "start": None, "end": None, "step": 1}
    shown = dict(list(values.items())[:given])
    args: tuple[Any, ...] = () if named else tuple(shown.values())
    kwargs: dict[str, Any] = shown if named else {}
    node = graph.call_function(ATEN.slice.Tensor, args, kwargs)
    assert arguments(node) == defaults | shown
    assert argument(node, "step") == (defaults | shown)["step"]


def test_functions_of_python_have_the_names_of_their_signature() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert arguments(graph.call_function(operator.getitem, (x, 1))) == {"a": x, "b": 1}


def test_an_argument_that_is_not_there_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(ATEN.linear.default, (x,))
    assert argument(node, "bias") is None
    with pytest.raises(InternalError, match="lacks its argument weight"):
        argument(node, "weight")
    with pytest.raises(InternalError, match="has no argument scale"):
        argument(node, "scale")
    with pytest.raises(InternalError, match="is no operator"):
        argument(x, "weight")


def test_an_argument_is_written_where_it_stands() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(ATEN.dropout.default, (x, 0.1), {"train": False})
    set_argument(node, "p", 0.2)
    set_argument(node, "train", True)
    assert (node.args, node.kwargs) == ((x, 0.2), {"train": True})


def test_what_a_graph_returns() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((x, None))
    assert output_value(graph) == (x, None)

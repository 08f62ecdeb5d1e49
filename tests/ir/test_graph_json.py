"""Graphs as JSON: what survives, what is refused, and that nothing else is looked up."""

from __future__ import annotations

import json
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.graph_json import graph_from_json, graph_to_json
from qalora_compile.ir.meta import mark_site, site_of
from qalora_compile.ir.operators import trust_operators
from tests.models import OneLinear

ATEN = torch.ops.aten


def through_text(graph: fx.Graph, module: nn.Module | None = None) -> fx.Graph:
    """Encode to JSON text and back."""
    text = json.dumps(graph_to_json(graph, module or nn.Module()))
    return graph_from_json(json.loads(text))[0]


def one_call(target: Any, *args: Any, **kwargs: Any) -> fx.Graph:
    """x → target(x, *args, **kwargs)."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *args), kwargs))
    return graph


FULL = {"dtype": torch.bfloat16, "layout": torch.strided, "device": torch.device("cpu")}
CALLS: dict[str, fx.Graph] = {
    "none": one_call(ATEN.clamp.default, None, 1),
    "bool": one_call(ATEN.sum.dim_IntList, [1], True),
    "int": one_call(ATEN.unsqueeze.default, -3),
    "float": one_call(ATEN.leaky_relu.default, 0.1),
    "infinity": one_call(ATEN.masked_fill.Scalar, True, float("-inf")),
    "text": one_call(ATEN.gelu.default, approximate="tanh"),
    "list": one_call(ATEN.permute.default, [1, 0, 2]),
    "tuple": one_call(ATEN.permute.default, (1, 0)),
    "one number for several axes": one_call(ATEN.max_pool2d.default, 2),
    "missing tensors in a list": one_call(ATEN.index.Tensor, [None, None]),
    "a number for a tensor": one_call(ATEN.add.Tensor, 1, alpha=2),
    "slice": one_call(operator.getitem, slice(None, 4, None)),
    "slices": one_call(operator.getitem, (slice(1, None, 2), (0, None))),
    "dtype, layout, device": one_call(ATEN.empty_like.default, **FULL),
    "memory format": one_call(ATEN.contiguous.default, memory_format=torch.channels_last),
    "words": one_call(torch.ops.higher_order.wrap_with_autocast, "cpu", {"a": [1], "b": (2,)}),
}


@pytest.mark.parametrize("kind", CALLS)
def test_arguments_survive(kind: str) -> None:
    _, before, _ = CALLS[kind].nodes
    _, after, _ = through_text(CALLS[kind]).nodes
    assert after.target is before.target
    for old, new in zip(before.args[1:], after.args[1:], strict=True):
        assert old == new
        assert type(old) is type(new)
    assert after.kwargs == before.kwargs


def test_not_a_number_survives() -> None:
    again = through_text(one_call(ATEN.leaky_relu.default, float("nan")))
    value = list(again.nodes)[1].args[1]
    assert isinstance(value, float)
    assert value != value


def test_names_sites_and_dropout_survive() -> None:
    graph = one_call(ATEN.relu.default)
    node = list(graph.nodes)[1]
    mark_site(node, "block.fc")
    node.meta["qalora_dropout_p"] = 0.25
    again = list(through_text(graph).nodes)
    assert [n.name for n in again] == [n.name for n in graph.nodes]
    assert site_of(again[1]) == "block.fc"
    assert site_of(again[0]) is None
    assert again[1].meta["qalora_dropout_p"] == 0.25


@pytest.mark.parametrize("target", [operator.getitem, operator.add, operator.mul, torch.sym_max])
def test_plain_functions_survive(target: Any) -> None:
    assert list(through_text(one_call(target, 0)).nodes)[1].target is target


def test_a_captured_graph_survives_with_its_call_signature() -> None:
    x = torch.randn(3, 16)
    program = qc.capture_model(OneLinear(16, 4), (x,))
    again = through_text(program.graph, program.module)
    module = fx.GraphModule(program.module, again)
    assert torch.equal(module(x), program(x))


def test_subgraphs_survive() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.cond(y.sum() > 0, lambda t: t * 2, lambda t: t - 1, (y,))

    x = torch.randn(3, 8)
    program = qc.capture_model(Branch(), (x,))
    value = json.loads(json.dumps(graph_to_json(program.graph, program.module)))
    assert value["subgraphs"]
    graph, subgraphs = graph_from_json(value)
    root: dict[str, Any] = {**program.tensors(), **subgraphs}
    module = fx.GraphModule(root, graph)
    for sign in (1.0, -1.0):
        assert torch.equal(module(x * sign), program(x * sign))


def test_an_argument_without_a_stored_form_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="argument of type object") as caught:
        through_text(one_call(ATEN.leaky_relu.default, object()))
    assert "relu" in str(caught.value)


def test_a_function_without_a_stored_form_is_refused() -> None:
    def local(x: Tensor) -> Tensor:
        return x

    with pytest.raises(UnsupportedError, match="local has no stored form"):
        through_text(one_call(local))


def stored(**changes: Any) -> dict[str, Any]:
    """A stored graph of one relu, with fields of that node replaced."""
    value = graph_to_json(one_call(ATEN.relu.default), nn.Module())
    value["nodes"][1] |= changes
    return value


MALFORMED: dict[str, dict[str, Any]] = {
    "no nodes": {},
    "unknown operator": stored(target="aten.no_such_operator.default"),
    "unknown overload": stored(target="aten.relu.no_such_overload"),
    "unknown namespace": stored(target="nowhere.relu.default"),
    "unknown reference": stored(args=[{"node": "later"}]),
    "unknown kind": stored(args=[{"pickle": "…"}]),
    "two kinds": stored(args=[{"float": "1", "str": "a"}]),
    "wrong dtype": stored(args=[{"dtype": "strided"}]),
    "bad float": stored(args=[{"float": "much"}]),
    "no subgraphs": {"nodes": []},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_graphs_are_refused(kind: str) -> None:
    with pytest.raises(UserInputError):
        graph_from_json(MALFORMED[kind])


WRONG_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "too many arguments": ("takes 1 positional", {"args": [{"node": "x"}, 1]}),
    "no argument": ("lacks its argument self", {"args": []}),
    "an unknown argument": ("unknown or twice", {"kwargs": {"other": 1}}),
    "an argument twice": ("unknown or twice", {"kwargs": {"self": 1}}),
    "text for a tensor": ("no Tensor", {"args": [{"str": "x"}]}),
    "a number that never ends": (
        "larger than any size",
        {"target": "_operator.pow", "args": [10, 10**9]},
    ),
    "text for a number": (
        "no int",
        {"target": "aten.unsqueeze.default", "args": [{"node": "x"}, {"str": "0"}]},
    ),
    "a bool for a number": (
        "no int",
        {"target": "aten.unsqueeze.default", "args": [{"node": "x"}, True]},
    ),
}


@pytest.mark.parametrize("kind", WRONG_CALLS)
def test_calls_are_compared_with_the_schema(kind: str) -> None:
    message, changes = WRONG_CALLS[kind]
    with pytest.raises(UserInputError, match=message):
        graph_from_json(stored(**changes))


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(UserInputError, match="two nodes are named"):
        graph_from_json(stored(name="x"))


FOREIGN = [
    "aten.from_file.default",
    "aten.add.out",
    "aten._sparse_coo_tensor_unsafe.default",
    "aten._nested_view_from_buffer.default",
    "aten.set_.source_Storage",
    "aten._print.default",
    "prims.copy_to.default",
    "higher_order.triton_kernel_wrapper_mutation",
    "higher_order.inductor_compiled_code",
    "math.factorial",
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "subprocess.run",
    "_operator.attrgetter",
    "_operator.methodcaller",
    "_operator.call",
    "operator.__builtins__",
    "load_library.__func__.__call__",
    "classes.load_library.__call__",
]


@pytest.mark.parametrize("target", FOREIGN)
def test_only_operators_are_looked_up(target: str) -> None:
    """Anything else in a stored graph could be made to run code, as a pickle could."""
    with pytest.raises(UserInputError):
        graph_from_json(stored(target=target))


@pytest.mark.parametrize("op", ["call_method", "call_module", "made_up"])
def test_only_the_node_kinds_of_exported_graphs_are_read(op: str) -> None:
    with pytest.raises(UserInputError):
        graph_from_json(stored(op=op, target="relu"))


@pytest.mark.parametrize("name", ["x y", "x=print()", "1x", "x):\n  pass #", "lambda"])
def test_argument_names_must_be_names(name: str) -> None:
    """They become Python source when the graph is compiled."""
    program = qc.capture_model(OneLinear(16, 4), (torch.randn(3, 16),))
    value = graph_to_json(program.graph, program.module)
    value["tree"]["arguments"] = [name]
    with pytest.raises(UserInputError):
        graph_from_json(value)


@pytest.mark.parametrize("name", ["x=print()", "*x, y"])
def test_placeholder_targets_must_be_names(name: str) -> None:
    value = stored()
    value["nodes"][0]["target"] = name
    with pytest.raises(UserInputError):
        graph_from_json(value)


def test_operators_of_ones_own_have_to_be_trusted() -> None:
    library = torch.library.Library("qalora_test_own", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    graph = one_call(torch.ops.qalora_test_own.twice.default)
    with pytest.raises(UnsupportedError, match="trust_operators"):
        graph_to_json(graph, nn.Module())
    trust_operators("qalora_test_own.twice.default")
    again = through_text(graph)
    assert torch.equal(fx.GraphModule(nn.Module(), again)(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    "name", ["x': __import__('os').system('id'), 'y", "x y", "lambda", "", "other"]
)
def test_keyword_names_of_the_tree_must_be_those_of_the_graph(name: str) -> None:
    """Torch writes them into source code, in quotes that it does not escape."""
    program = qc.capture_model(OneLinear(16, 4), (), {"x": torch.randn(3, 16)})
    value = graph_to_json(program.graph, program.module)
    protocol, tree = json.loads(value["tree"]["in"])
    tree["children_spec"][1]["context"] = json.dumps([name])
    value["tree"]["in"] = json.dumps([protocol, tree])
    with pytest.raises(UserInputError):
        graph_from_json(value)

"""`ProgramModule`: code is made on demand; copies of graphs; erasing what nothing reads."""

from __future__ import annotations

import copy
import inspect
import pickle

import torch
from torch import nn

import qalora_compile as qc
from qalora_compile.ir.module import copy_graph, erase_unread
from tests.models import MLP, adapted, worst

X = torch.randn(3, 32)


def compiled(program: qc.Program) -> bool:
    return "forward" in vars(type(program.module))


def dropout() -> qc.Program:
    return qc.capture_model(nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.5)).eval(), (X,))


def test_code_is_made_when_it_is_needed() -> None:
    program = adapted(MLP(32, 8).eval(), (X,))
    assert not compiled(program)
    assert str(program)
    assert not compiled(program), "printing reads the graph"
    program(X)
    assert compiled(program)
    other = qc.fold_adapters(program)
    assert "group_linear" in other.module.code
    assert list(inspect.signature(qc.fold_adapters(program).module.forward).parameters) == ["x"]


def test_modes_hold_before_and_after_compilation() -> None:
    for early in (True, False):
        program = dropout()
        if early:
            program(X)
        torch.manual_seed(0)
        trained = program.train()(X)
        assert (trained == 0).any()
        assert not (program.eval()(X) == 0).any()


def test_a_new_graph_replaces_the_code() -> None:
    program = dropout()
    before = program(X)
    graph = program.copy_graph()
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        double = graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], 2))
    output.args = ((double,),)
    program.module.graph = graph
    assert worst(program.module(X), 2 * before) == 0.0


def test_modules_are_copied_and_pickled() -> None:
    program = dropout()
    for module in (copy.deepcopy(program.module), pickle.loads(pickle.dumps(program.module))):
        assert worst(module(X), program(X)) == 0.0


def test_a_copied_graph_is_the_same_and_apart() -> None:
    graph = adapted(MLP(32, 16, 8).eval(), (X,)).graph
    copied = copy_graph(graph)
    copied.lint()
    rows = [
        [(n.name, n.op, n.target, str(n.args), str(n.kwargs), n.meta.keys()) for n in g.nodes]
        for g in (graph, copied)
    ]
    assert rows[0] == rows[1]
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        assert [n.name for n in old.users] == [n.name for n in new.users]
        new.meta["mine"] = True
        assert "mine" not in old.meta
    found = copied.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    assert [n.name for n in found] == ["tanh"]
    with copied.inserting_before(found[0]):
        fresh = copied.create_node("call_function", found[0].target, found[0].args, name="tanh")
    assert fresh.name == "tanh_1", "names of a copy are taken"


def test_what_nothing_reads_is_erased_and_nothing_else() -> None:
    program = qc.capture_model(MLP(32, 8).eval(), (X,))
    graph = program.copy_graph()
    linear = next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default)
    with graph.inserting_before(linear):
        view = graph.call_function(torch.ops.aten.t.default, (linear.args[1],))
        view = graph.call_function(torch.ops.aten.t.default, (view,))
        unread = graph.call_function(torch.ops.aten.neg.default, (linear.args[0],))
    erase_unread([view, view, linear])
    names = {n.name for n in graph.nodes}
    assert view.name not in names
    assert {linear.name, linear.args[1].name, unread.name} <= names
    assert len(graph.nodes) == len(program.graph.nodes) + 1

"""`ProgramModule`: code is made on demand; copies of graphs; erasing what nothing reads."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import qalora_compile as qc
from qalora_compile.errors import PreconditionError
from qalora_compile.ir.module import copy_graph, erase_unread, program_tensors
from qalora_compile.training import TrainingForward
from tests.models import MLP, adapted, llama, worst

X = torch.randn(3, 32)
ARGUMENTS = (X, torch.ones(3, 32, dtype=torch.long))
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


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


class Positions(nn.Module):
    """Makes tensors of its own, moves one, and computes in an autocast block."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("table", torch.randn(64))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = mask.to(device=x.device, dtype=torch.bool)
        with torch.autocast("cpu", enabled=False):
            at = torch.arange(x.shape[1], device=x.device) + self.table[0]
        hidden = self.linear(x) * at + torch.tensor([2.0], device=x.device)
        return torch.where(kept, hidden, torch.zeros(x.shape, device=x.device))


def test_what_a_graph_makes_follows_its_tensors() -> None:
    # An operator with tensors on two devices fails; "meta" is a second device on every machine.
    mask = ARGUMENTS[1]
    program = adapted(Positions().eval(), ARGUMENTS)
    before = program(*ARGUMENTS)
    parameters = program.adapter_parameters()
    moved = copy.deepcopy(program.module).to("meta")
    assert all(tensor.is_meta for tensor in program_tensors(moved).values())
    assert devices(moved) == {"meta"}
    assert moved(X.to("meta"), mask.to("meta")).is_meta
    assert devices(program.module) == {"cpu"}, "a copy has a graph of its own"
    assert program.to("cpu") is program
    assert worst(program(*ARGUMENTS), before) == 0.0
    assert all(a is b for a, b in zip(program.adapter_parameters(), parameters, strict=True))


def devices(module: nn.Module) -> set[str]:
    """Kinds of the devices that all graphs of a module name."""
    found: set[str] = set()
    for graph in (m.graph for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.nodes:
            values = (*pytree.tree_leaves(node.args), *pytree.tree_leaves(node.kwargs))
            found |= {value.type for value in values if isinstance(value, torch.device)}
    return found


def test_autocast_blocks_follow() -> None:
    # Nothing is computed: no machine of the tests has the device.
    module = adapted(Positions().eval(), ARGUMENTS).module
    blocks = [n for n in module.graph.nodes if n.target is AUTOCAST]
    assert [block.args[0] for block in blocks] == ["cpu"]
    module.move_graph(torch.device("cuda", 1))
    assert [block.args[0] for block in blocks] == ["cuda"]
    assert devices(module) == {"cuda"}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "scale"])
def test_training_runs_on_a_device_that_a_program_was_moved_to(
    kind: str, checkpointed: bool
) -> None:
    model, ids = llama(), torch.arange(12).reshape(2, 6)
    arguments = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    spec = qc.QuantSpec(zero_point="integer" if kind == "scale" else "real")
    program = qc.quantize_groups(qc.capture_model(model, (ids,), arguments), spec)
    program = qc.insert_adapters(program, qc.AdapterSpec(kind=kind)).to("meta").train()
    forward = TrainingForward(program, gradient_checkpointing=checkpointed)
    mask = torch.ones(ids.shape, dtype=torch.long, device="meta")
    logits = forward(ids.to("meta"), attention_mask=mask, use_cache=False).logits
    logits.sum().backward()
    gradients = [parameter.grad for parameter in program.adapter_parameters()]
    assert gradients and all(g is not None and g.is_meta for g in gradients)


def test_a_program_elsewhere_is_stored_for_the_cpu_and_not_exported(tmp_path: Path) -> None:
    program = qc.quantize_groups(qc.capture_model(Positions().eval(), ARGUMENTS))
    program.module.move_graph(torch.device("cuda", 0))  # as training there leaves it
    program.save(tmp_path / "stored")
    assert devices(qc.Program.load(tmp_path / "stored").module) == {"cpu"}
    with pytest.raises(PreconditionError, match="the program is on meta"):
        qc.export_model(program.to("meta"), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()

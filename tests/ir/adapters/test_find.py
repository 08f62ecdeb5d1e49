"""Adapters of a program: one interface for every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import qalora_compile as qc
from qalora_compile.errors import InternalError, PreconditionError
from qalora_compile.ir.adapters.added import AddedAdapter, ExpertsAdapter
from qalora_compile.ir.adapters.affine import AffineAdapter, TrainedCodes
from qalora_compile.ir.adapters.base import AdapterSettings
from qalora_compile.ir.adapters.find import adapter_at, find_adapters
from qalora_compile.ir.adapters.integer_zero import IntegerZero, TrainedScale
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear, GroupSum, PooledAdapter
from qalora_compile.ir.ops.views import set_argument
from tests.models import MLP, randomize_adapters

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "pooled": (AddedAdapter, {"dropout": 0.25}),
    "integer": (IntegerZero, {"zero_point": "integer"}),
    "scale": (TrainedScale, {"kind": "scale"}),
    "affine": (AffineAdapter, {"kind": "affine"}),
    "qat": (TrainedCodes, {"kind": "qat"}),
}
INTEGER_BASE = ("integer", "scale")
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(kind: str) -> qc.Program:
    spec = qc.QuantSpec(
        bits=4, group_size=8, zero_point="integer" if kind in INTEGER_BASE else "real"
    )
    program = qc.quantize_groups(qc.capture_model(MLP(20, 12, 5), (torch.ones(2, 20),)), spec)
    adapter = qc.AdapterSpec(rank=2, alpha=4.0, **KINDS[kind][1])
    return randomize_adapters(qc.insert_adapters(program, adapter))


@every_kind
def test_each_use_is_found_with_its_kind_site_and_tensors(kind: str) -> None:
    program = adapted(kind)
    found = find_adapters(program.graph)
    assert [type(adapter) for adapter in found] == [KINDS[kind][0]] * 2
    assert [adapter.site for adapter in found] == ["layers.0", "layers.1"]
    assert [adapter.path for adapter in found] == ["layers.0", "layers.1"]
    names = found[0].names
    parts = ("qweight", "scale", "offset", *found[0].trains)
    assert names == {part: f"layers.0.{part}" for part in parts}
    assert found[0].settings.pool == 8
    assert found[0].settings.scaling == 2.0
    assert found[0].settings.dropout == (0.25 if kind == "pooled" else 0.0)
    assert found[0].description.startswith("times 2.0 on ")
    assert isinstance(found[0].layer, GroupLinear)
    assert found[0].layer.bits == 4


@every_kind
def test_folding_gives_what_moves_and_leaves_the_layer_alone(kind: str) -> None:
    program = adapted(kind)
    graph, tensors = program.copy_graph(), program.tensors()
    for adapter in find_adapters(graph):
        names = adapter.names
        made = adapter.fold(*(tensors[names[part]] for part in adapter.reads))
        moved = {part for part, new in made.items() if not torch.equal(new, tensors[names[part]])}
        assert moved == set(adapter.moves)
        tensors |= {names[part]: made[part] for part in adapter.moves}
        adapter.remove(graph)
    assert find_adapters(graph) == []
    assert len(list(GroupLinear.all_in(graph))) == 2
    x, plain = torch.randn(3, 20), program.evolve(graph=graph, tensors=tensors)
    torch.testing.assert_close(plain(x), program.eval()(x), rtol=1e-4, atol=1e-4)


@every_kind
def test_a_fold_does_not_need_the_graph_any_more(kind: str) -> None:
    program = adapted(kind)
    graph, tensors = program.copy_graph(), program.tensors()
    adapter, *_ = find_adapters(graph)
    inputs = [tensors[adapter.names[part]] for part in adapter.reads]
    fold, before = adapter.fold, adapter.fold(*inputs)
    adapter.remove(graph)
    after = fold(*inputs)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[part], before[part]) for part in after)


def test_experts_and_their_adapter_must_assign_rows_alike() -> None:
    graph = fx.Graph()
    x, weight, a, b, ends, others = (graph.placeholder(name) for name in "xwabeo")
    layer = ExpertLinear.create(graph, x, weight, weight, weight, ends, 4, 8)
    ExpertsAdapter.insert(graph, layer, (a, b), AdapterSettings(2.0, 8))
    (adapter,) = find_adapters(graph)
    assert isinstance(adapter, ExpertsAdapter)
    assert adapter.layer == ExpertLinear.of(layer)
    set_argument(adapter.node, "group_offsets", others)
    with pytest.raises(PreconditionError, match="differently"):
        _ = adapter.layer


def test_an_adapter_that_stands_alone_is_refused() -> None:
    graph = fx.Graph()
    x, a, b = (graph.placeholder(name) for name in "xab")
    update = PooledAdapter.create(graph, GroupSum.create(graph, x, 8), a, b, 2.0)
    adapter = adapter_at(update)
    assert adapter is not None
    with pytest.raises(PreconditionError, match="not simply added"):
        _ = adapter.layer
    assert adapter_at(x) is None


def test_an_unknown_kind_is_refused() -> None:
    program = adapted("integer")
    graph = program.copy_graph()
    adapter, *_ = find_adapters(graph)
    set_argument(adapter.node, "kind", "shift")
    with pytest.raises(InternalError, match="no adapter of kind shift"):
        find_adapters(graph)

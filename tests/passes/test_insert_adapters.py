"""insert-adapters: a pooled adapter at every quantized site, zero at the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import qalora_compile as qc
from qalora_compile.config import POOLINGS
from qalora_compile.errors import (
    InternalError,
    PostconditionError,
    PreconditionError,
    UserInputError,
)
from qalora_compile.ir.adapters.added import AddedAdapter
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.spec import GROUP_SUM, POOLED_ADAPTER
from qalora_compile.passes import insert_adapters as pass_module
from qalora_compile.passes.insert_adapters import InsertAdapters
from tests.models import MLP, ThreeReaders, UsedTwice, adapted, assert_close, bert, worst

Golden = Callable[[str, str], None]


def quantized(model: torch.nn.Module, x: Tensor, group: int = 8) -> qc.Program:
    return qc.quantize_groups(qc.capture_model(model.eval(), (x,)), qc.QuantSpec(group_size=group))


def test_golden(golden: Golden) -> None:
    program = quantized(MLP(16, 24, 8), torch.randn(2, 16))
    golden("insert-adapters", str(InsertAdapters(rank=2, alpha=3.0)(program).program))


def test_nothing_changes_at_the_start() -> None:
    x = torch.randn(3, 20, dtype=torch.float64)
    before = quantized(MLP(20, 12, 5).double(), x)
    assert worst(qc.insert_adapters(before)(x), before(x)) == 0.0


@given(
    pooling=st.sampled_from(POOLINGS),
    k=st.integers(1, 40),
    group=st.integers(1, 16),
    times=st.integers(1, 3),
    rank=st.integers(1, 5),
    rslora=st.booleans(),
)
@settings(max_examples=12)
def test_the_adapter_computes_its_formula(
    pooling: str, k: int, group: int, times: int, rank: int, rslora: bool
) -> None:
    pool = group * times
    spec = qc.AdapterSpec(rank=rank, alpha=1.5, pooling=pooling, group_size=pool, use_rslora=rslora)
    x = torch.randn(3, k, dtype=torch.float64)
    model = MLP(k, 6).double().eval()
    program = adapted(model, (x,), qc.QuantSpec(group_size=group), spec, size=0.5)
    bare = quantized(model, x, group)
    parts = {n.rpartition(".")[2]: p.detach() for n, p in program.named_adapter_parameters()}
    chunks = x.split(pool, dim=-1)
    factor = {
        "sum": 1.0,
        "mean": 1 / pool,
        "mean_times_groups": len(chunks) / pool,
        "scaled_sum": 1 / math.sqrt(pool),
    }[pooling]
    pooled = torch.stack([chunk.sum(-1) for chunk in chunks], dim=-1)
    scaling = 1.5 / (rank**0.5 if rslora else rank)
    update = scaling * factor * pooled @ parts["lora_A"].t() @ parts["lora_B"].t()
    assert_close(program(x), bare(x) + update, relative=1e-12)


def test_only_adapters_train_and_all_get_gradients() -> None:
    ids = torch.randint(0, 128, (2, 8))
    program = adapted(bert(), (ids,))
    program(ids).last_hidden_state.square().mean().backward()
    gradients = {n for n, p in program.module.named_parameters() if p.grad is not None}
    expected = {n for n, _ in program.named_adapter_parameters() if "pooler" not in n}
    assert gradients == expected  # the pooler's output is not part of the loss


def test_a_shared_weight_has_one_adapter() -> None:
    program = adapted(UsedTwice(), (torch.randn(2, 32),))
    assert sum(n.target is POOLED_ADAPTER for n in program.graph.nodes) == 3
    assert len(program.adapter_parameters()) == 4


def test_readers_of_one_tensor_share_a_sum() -> None:
    program = adapted(ThreeReaders(), (torch.randn(2, 64),))
    assert sum(n.target is GROUP_SUM for n in program.graph.nodes) == 1


def test_the_seed_decides_the_start() -> None:
    program = quantized(MLP(16, 8), torch.randn(2, 16))

    def start(seed: int) -> Tensor:
        spec = qc.AdapterSpec(rank=2, seed=seed)
        return qc.insert_adapters(program, spec).adapter_parameters()[0]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize("pool", [1, 4, 12])
def test_a_pool_that_is_no_multiple_is_refused(pool: int) -> None:
    program = quantized(MLP(16, 8), torch.randn(2, 16))
    with pytest.raises(PreconditionError, match=f"groups of {pool}, .* groups of 8") as caught:
        qc.insert_adapters(program, qc.AdapterSpec(group_size=pool))
    assert caught.value.where == "layers.0"
    assert caught.value.pass_name == "insert-adapters"


def test_a_float_program_is_refused() -> None:
    program = qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    with pytest.raises(PreconditionError, match="takes a program at stage quantized"):
        qc.insert_adapters(program)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"pooling": "max"}, {"alpha": float("nan")}, {"group_size": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserInputError):
        qc.AdapterSpec(**options)  # type: ignore[arg-type]


def test_an_adapter_that_does_not_start_at_zero_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = InsertAdapters._make_adapters

    def shifted(self: InsertAdapters, program: qc.Program) -> dict[str, Tensor]:
        made = real(self, program)
        for name, tensor in made.items():
            if name.endswith("lora_B"):
                tensor.data += 1
        return made

    monkeypatch.setattr(InsertAdapters, "_make_adapters", shifted)
    with pytest.raises(PostconditionError, match="start at zero"):
        qc.insert_adapters(quantized(MLP(16, 8), torch.randn(2, 16)))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_starts_within_its_bound_and_b_at_zero(pooling: str) -> None:
    """±1 / (f √K): pooled by f, the entries are as large as those of a plain LoRA of width K."""
    program = quantized(MLP(100, 6), torch.randn(2, 100), group=16)
    after = qc.insert_adapters(program, qc.AdapterSpec(rank=64, pooling=pooling))
    lora_a, lora_b = (p.detach() for p in after.adapter_parameters())
    factors = {"sum": 1.0, "mean": 1 / 16, "mean_times_groups": 7 / 16, "scaled_sum": 1 / 4}
    factor = factors[pooling]
    bound = 1 / (factor * 10)
    assert lora_a.shape == (64, 7)
    assert 0.9 * bound < float(lora_a.abs().max()) <= bound * (1 + 1e-6)
    assert abs(float(lora_a.mean())) < 0.15 * bound
    assert float(lora_b.abs().max()) == 0.0


def test_layers_with_other_numbers_of_groups_get_their_own_shapes() -> None:
    program = quantized(MLP(20, 12, 5), torch.randn(2, 20))
    after = qc.insert_adapters(program, qc.AdapterSpec(rank=3, group_size=16))
    shapes = {n: tuple(p.shape) for n, p in after.named_adapter_parameters()}
    assert shapes == {
        "layers.0.lora_A": (3, 2),
        "layers.0.lora_B": (12, 3),
        "layers.1.lora_A": (3, 1),
        "layers.1.lora_B": (5, 3),
    }
    assert [s.rank for s in after.plan] == [3, 3]


def test_the_shared_adapter_learns_from_both_uses() -> None:
    x = torch.randn(4, 32, dtype=torch.float64)
    program = adapted(UsedTwice().double(), (x,), qc.QuantSpec(group_size=8))
    lora_b = dict(program.named_adapter_parameters())["shared.lora_B"]
    program(x).sum().backward()
    assert lora_b.grad is not None
    step = 1e-6
    with torch.no_grad():
        base = program(x).sum()
        lora_b[3, 1] += step
        moved = (program(x).sum() - base) / step
    assert float(moved) == pytest.approx(float(lora_b.grad[3, 1]), rel=1e-4, abs=1e-6)


def test_an_adapter_that_was_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = AddedAdapter.insert

    def skip(graph: fx.Graph, layer: fx.Node, *settings: Any) -> None:
        if site_of(layer) != "layers.0":
            real(graph, layer, *settings)

    monkeypatch.setattr(AddedAdapter, "insert", skip)
    with pytest.raises(PostconditionError, match="1 adapters for 2 sites"):
        qc.insert_adapters(quantized(MLP(16, 8, 4), torch.randn(2, 16)))


def test_an_adapter_of_the_wrong_width_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail group that gets no column of A."""
    monkeypatch.setattr(pass_module, "group_count", lambda k, g: k // g)
    with pytest.raises(InternalError, match="A has 2 groups"):
        qc.insert_adapters(quantized(MLP(20, 4), torch.randn(2, 20)))


def test_an_adapter_without_its_pooling_factor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 20, dtype=torch.float64)
    model = MLP(20, 6).double().eval()
    spec = qc.AdapterSpec(rank=2, pooling="mean")
    right = adapted(model, (x,), qc.QuantSpec(group_size=8), spec)
    monkeypatch.setattr(InsertAdapters, "_pooling", lambda self, site: 1.0)
    wrong = adapted(model, (x,), qc.QuantSpec(group_size=8), spec)
    with torch.no_grad():  # the same A and B: what differs is the factor in the graph alone
        for ours, theirs in zip(
            wrong.adapter_parameters(), right.adapter_parameters(), strict=True
        ):
            ours.copy_(theirs)
    report = qc.verify_equivalence(right, wrong, [(x,)], qc.Tolerance(max_rel=1e-6))
    assert not report.passed
    bare = quantized(model, x)
    assert_close(wrong(x) - bare(x), 8 * (right(x) - bare(x)), relative=1e-9)


@pytest.mark.parametrize(
    ("rank", "wanted"),
    [
        (2, None),
        (3, "rank 3 is above the number of groups of 1 of 2 layers, which have 2 groups"),
        (9, "rank 9 is above the number of groups of every layer: rank 4 can learn the same"),
    ],
)
def test_a_rank_above_the_number_of_groups_is_said(rank: int, wanted: str | None) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    program = qc.quantize_groups(qc.capture_model(model, (torch.randn(2, 64),)))
    notes = qc.insert_adapters(program, qc.AdapterSpec(rank=rank)).notes
    assert [note for note in notes if "number of groups" in note] == [
        note for note in notes if wanted is not None and note.startswith(wanted)
    ]
    assert any("number of groups" in note for note in notes) == (wanted is not None)

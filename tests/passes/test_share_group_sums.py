"""share-group-sums: one sum for all readers, and never for readers of another tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.ir.spec import GROUP_SUM
from qalora_compile.passes import PassResult
from qalora_compile.passes.insert_adapters import InsertAdapters
from qalora_compile.passes.legalize.legalize_ort_stock import LegalizeOrtStock
from qalora_compile.passes.share_group_sums import ShareGroupSums
from tests.models import MLP, ThreeReaders, adapted, llama, randomize_adapters, token_ids, worst

Golden = Callable[[str, str], None]


def sums(program: qc.Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is GROUP_SUM]


def unshared(group: int = 16, width: int = 64) -> tuple[qc.Program, torch.Tensor]:
    x = torch.randn(2, width, dtype=torch.float64)
    program = qc.capture_model(ThreeReaders(width).double().eval(), (x,))
    program = qc.quantize_groups(program, qc.QuantSpec(group_size=group))
    return randomize_adapters(InsertAdapters(rank=2)(program).program), x


def test_golden(golden: Golden) -> None:
    golden("share-group-sums", str(ShareGroupSums()(unshared()[0]).program))


@given(group=st.integers(1, 40), width=st.integers(1, 48))
@settings(max_examples=10)
def test_sharing_is_bit_identical(group: int, width: int) -> None:
    program, x = unshared(group, width)
    result = ShareGroupSums()(program)
    assert len(sums(program)) == 3
    assert len(sums(result.program)) == 1
    assert len(result.changes) == 2
    assert worst(result.program(x), program(x)) == 0.0


def test_other_inputs_are_not_merged() -> None:
    x = torch.randn(2, 32)
    program = adapted(MLP(32, 32, 32).eval(), (x,), qc.QuantSpec(group_size=16))
    assert len(sums(program)) == 2
    result = ShareGroupSums()(program)
    assert not result.modified


def test_a_stale_shared_sum_is_caught() -> None:
    x = torch.randn(2, 32)
    program = adapted(MLP(32, 32, 32).eval(), (x,), qc.QuantSpec(group_size=16))
    lowered = lower(qc.fold_adapters(program), qc.ExportSpec(target="ort-stock"))
    graph = lowered.copy_graph()
    first, second = (n for n in graph.nodes if n.target is GROUP_SUM)
    second.replace_all_uses_with(first)
    graph.erase_node(second)
    report = qc.verify_equivalence(
        lowered, lowered.evolve(graph=graph), [(x,)], qc.Tolerance(max_rel=1e-4)
    )
    assert not report.passed
    assert report.first_divergence == "layers.1"


def test_q_k_v_and_gate_up_of_a_llama_share() -> None:
    folded = qc.fold_adapters(adapted(llama(), (token_ids(2, 16),)))
    lowered = lower(folded, qc.ExportSpec(target="ort-stock"))
    assert len(sums(lowered)) == 2 * 4, "attention, its output, gate and up, down: of two layers"


def test_a_folded_program_has_nothing_to_share() -> None:
    program, _ = unshared()
    with pytest.raises(PreconditionError, match="share-group-sums takes"):
        ShareGroupSums()(qc.fold_adapters(program))


def test_sums_of_other_sizes_are_not_merged() -> None:
    program, x = unshared(16)
    graph = program.copy_graph()
    graph_sums = [n for n in graph.nodes if n.target is GROUP_SUM]
    graph_sums[1].args = (graph_sums[1].args[0], 48)  # 64 columns: four groups of 16, two of 48
    update = next(iter(graph_sums[1].users))
    lora_a = str(update.args[1].target)
    tensors = program.tensors()
    tensors[lora_a] = torch.nn.Parameter(tensors[lora_a].detach()[:, :2].clone())
    other = program.evolve(graph=graph, tensors=tensors)
    result = ShareGroupSums()(other)
    assert [n.args[1] for n in sums(result.program)] == [16, 48]
    assert worst(result.program(x), other(x)) == 0.0


def test_lowered_layers_with_adapters_share_one_sum_for_both_uses() -> None:
    program = randomize_adapters(
        InsertAdapters(rank=2)(
            qc.quantize_groups(
                qc.capture_model(ThreeReaders().eval(), (torch.randn(2, 64),)),
                qc.QuantSpec(group_size=16),
            )
        ).program
    )
    lowered = LegalizeOrtStock()(program).program
    result = ShareGroupSums()(lowered)
    x = torch.randn(5, 64)
    assert len(sums(lowered)) == 6, "an adapter's and a correction's, of three layers"
    assert len(sums(result.program)) == 1
    assert worst(result.program(x), lowered(x)) == 0.0


def test_sharing_twice_changes_nothing_more() -> None:
    once = ShareGroupSums()(unshared()[0]).program
    again = ShareGroupSums()(once)
    assert not again.modified
    assert str(again.program) == str(once)


def test_the_changes_name_the_sum_that_stays() -> None:
    program, _ = unshared()
    first, second, third = (n.name for n in sums(program))
    changes = ShareGroupSums()(program).changes
    assert [(c.path, c.what) for c in changes] == [
        (second, f"shares {first}"),
        (third, f"shares {first}"),
    ]


def test_equal_sums_that_are_left_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(self: ShareGroupSums, program: qc.Program) -> PassResult:
        return PassResult(program.evolve(graph=program.copy_graph()))

    monkeypatch.setattr(ShareGroupSums, "call", idle)
    with pytest.raises(PostconditionError, match="two equal group-sums") as caught:
        ShareGroupSums()(unshared()[0])
    assert caught.value.pass_name == "share-group-sums"


def test_a_pass_that_looks_at_the_size_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of the first layer's input stands in for one of the second layer's."""
    x = torch.randn(3, 32, dtype=torch.float64)
    program = adapted(MLP(32, 32, 32).double().eval(), (x,), qc.QuantSpec(group_size=16))

    def by_size(self: ShareGroupSums, program: qc.Program) -> PassResult:
        graph = program.copy_graph()
        first: dict[object, fx.Node] = {}
        for node in [n for n in graph.nodes if n.target is GROUP_SUM]:
            keeper = first.setdefault(node.args[1], node)
            if keeper is not node:
                node.replace_all_uses_with(keeper)
                graph.erase_node(node)
        return PassResult(program.evolve(graph=graph))

    monkeypatch.setattr(ShareGroupSums, "call", by_size)
    wrong = ShareGroupSums()(program).program
    report = qc.verify_equivalence(program, wrong, [(x,)], qc.Tolerance(max_rel=1e-6))
    assert not report.passed
    assert report.first_divergence == "layers.1"
    with pytest.raises(PreconditionError, match="pools another tensor"):
        qc.fold_adapters(wrong)

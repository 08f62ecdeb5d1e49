"""share-group-sums: one sum for all readers, and never for readers of another tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.errors import PreconditionError
from qalora_compile.ir.spec import GROUP_SUM
from qalora_compile.passes.insert_adapters import InsertAdapters
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
    lowered = lower(qc.fold_adapters(program), qc.ExportSpec())
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
    folded = qc.fold_adapters(adapted(llama(), (token_ids(2, 8),)))
    lowered = lower(folded, qc.ExportSpec())
    assert len(sums(lowered)) == 2 * 4, "attention, its output, gate and up, down: of two layers"


def test_a_folded_program_has_nothing_to_share() -> None:
    program, _ = unshared()
    with pytest.raises(PreconditionError, match="share-group-sums takes"):
        ShareGroupSums()(qc.fold_adapters(program))

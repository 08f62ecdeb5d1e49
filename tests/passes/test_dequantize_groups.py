"""dequantize-groups: the same function on float weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError
from qalora_compile.ir.spec import ON_CODES
from qalora_compile.ir.stages import FLOAT
from qalora_compile.passes.dequantize_groups import DequantizeGroups
from tests.models import MLP, UsedTwice, adapted, worst
from tests.zoo.entries import ENTRIES

Golden = Callable[[str, str], None]


@given(bits=st.sampled_from([2, 3, 4, 8]), group=st.integers(1, 40), k=st.integers(1, 50))
@settings(max_examples=10)
def test_the_function_stays(bits: int, group: int, k: int) -> None:
    x = torch.randn(3, k, dtype=torch.float64)
    spec = qc.QuantSpec(bits=bits, group_size=group)
    program = qc.quantize_groups(qc.capture_model(MLP(k, 9, 4).double().eval(), (x,)), spec)
    after = DequantizeGroups()(program).program
    assert after.stage == FLOAT
    assert not any(node.target in ON_CODES for node in after.graph.nodes)
    assert worst(after(x), program(x)) < 1e-12


def test_a_weight_used_twice_is_one_tensor() -> None:
    x = torch.randn(2, 32)
    folded = qc.fold_adapters(adapted(UsedTwice().eval(), (x,)))
    result = DequantizeGroups()(folded)
    assert sum(name.endswith(".dequantized") for name in result.program.tensors()) == 2
    assert len(result.changes) == 2
    assert worst(result.program(x), folded(x)) < 1e-5


def test_golden(golden: Golden) -> None:
    x = torch.randn(2, 40)
    program = qc.quantize_groups(qc.capture_model(MLP(40, 8, 4).eval(), (x,)))
    golden("dequantize-groups", str(DequantizeGroups()(program).program))


def test_adapters_must_be_folded_before() -> None:
    with pytest.raises(PreconditionError, match="fold the adapters first"):
        DequantizeGroups()(adapted(MLP(40, 8).eval(), (torch.randn(2, 40),)))


def test_stacked_experts_are_refused() -> None:
    entry = ENTRIES["batched-experts"]
    args, kwargs = entry.inputs(2, 16, 0)
    program = qc.quantize_groups(qc.capture_model(entry.build(), args, kwargs))
    with pytest.raises(UnsupportedError, match="experts"):
        DequantizeGroups()(program)

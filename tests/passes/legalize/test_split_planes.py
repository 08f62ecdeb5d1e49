"""split-planes: 8 bits as two planes of 4, exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qalora_compile as qc
from qalora_compile.errors import PostconditionError
from qalora_compile.ir.affine import dequantize
from qalora_compile.passes.legalize import split_planes as pass_module
from qalora_compile.passes.legalize.split_planes import SplitPlanes
from qalora_compile.quantizers.minmax import quantize_integer_zero
from tests.models import TiedHead, worst
from tests.passes.test_quantize_embeddings import VOCABULARY, WIDTH, Untied, captured, ids_of

Golden = Callable[[str, str], None]


def tied(bits: int = 8, dtype: torch.dtype = torch.float32) -> qc.Program:
    torch.manual_seed(0)
    model = TiedHead(VOCABULARY, WIDTH).to(dtype)
    return qc.quantize_groups(captured(model), embeddings=qc.QuantSpec(bits=bits))


def test_golden(golden: Golden) -> None:
    golden("split-planes", str(SplitPlanes()(tied()).program))


def test_the_function_stays() -> None:
    program, ids = tied(dtype=torch.float64), ids_of(3, 7)
    result = SplitPlanes()(program)
    assert [change.path for change in result.changes] == ["lm_head"]
    assert worst(result.program(ids), program(ids)) < 1e-12
    untied = qc.quantize_groups(captured(Untied()), embeddings=qc.QuantSpec(bits=8))
    assert len(SplitPlanes()(untied).changes) == 2  # a bias is added once
    torch.testing.assert_close(SplitPlanes()(untied).program(ids), untied(ids))


@given(group=st.integers(1, 40), k=st.integers(1, 50), shift=st.floats(-3, 3))
@settings(max_examples=20)
def test_looked_up_rows_are_the_same_floats(group: int, k: int, shift: float) -> None:
    weight = torch.randn(6, k, generator=torch.Generator().manual_seed(k)) + shift
    affine = quantize_integer_zero(weight, 8, group)
    made = pass_module._Planes(k)(affine.pack(), affine.scale, affine.offset)
    low, high = (
        dequantize(
            made[f"{plane}.qweight"],
            made[f"{plane}.scale"],
            made[f"{plane}.offset"],
            bits=4,
            group_size=group,
            k=k,
        )
        for plane in ("low", "high")
    )
    exact = affine.scale.double().repeat_interleave(group, 1)[:, :k] * (
        affine.codes.double()
        + (affine.offset.double() / affine.scale.double()).repeat_interleave(group, 1)[:, :k]
    )
    assert torch.equal((low + 16 * high).double(), exact)


def test_other_layers_are_left_alone() -> None:
    assert not SplitPlanes()(tied(4)).changes
    wide = qc.quantize_groups(captured(Untied()), qc.QuantSpec(bits=8))
    assert not SplitPlanes()(wide).changes  # real-valued zero-points


def test_real_zero_points_are_split_on_request() -> None:
    program, ids = qc.quantize_groups(captured(Untied()), qc.QuantSpec(bits=8)), ids_of(3, 7)
    result = SplitPlanes(real_zero_points=True)(program)
    assert [change.path for change in result.changes] == ["mid", "head"]
    torch.testing.assert_close(result.program(ids), program(ids))
    assert "real-zero-points=true" in result.program.history[-1]


@given(group=st.integers(1, 40), k=st.integers(1, 50), shift=st.floats(-3, 3))
@settings(max_examples=20)
def test_real_zero_points_are_the_exact_sum_of_two(group: int, k: int, shift: float) -> None:
    """Groups whose zero-point is far from the codes, as after a fold, keep theirs."""
    generator = torch.Generator().manual_seed(k)
    scale = torch.rand(6, -(-k // group), generator=generator)
    offset = -scale * (128 + 200 * shift * torch.rand(scale.shape, generator=generator))
    low, high = pass_module._real_offsets(scale, offset)
    assert torch.equal(low.double() + 16 * high.double(), offset.double())
    assert set((-high / scale).unique().tolist()) <= {0.0, 8.0}
    near = (-offset / scale - 160).abs() < 90
    assert torch.equal((-high / scale)[near], torch.full_like(high, 8)[near])


def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "_STEP", 15)
    with pytest.raises(PostconditionError, match="not an integer code"):
        SplitPlanes()(tied())

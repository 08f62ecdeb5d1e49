"""canonicalize-clamps: infinite bounds go, and every value stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.passes.canonicalize.canonicalize_clamps import CanonicalizeClamps
from qalora_compile.passes.framework.base import PassResult

Golden = Callable[[str, str], None]


class Clamped(nn.Module):
    """A layer with bounds, as Mamba's steps of time have them."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.proj = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 16]` → `[batch, 8]`."""
        return torch.clamp(self.proj(x), self.low, self.high)


def canonical(low: float | None, high: float | None, x: Tensor) -> tuple[qc.Program, int]:
    torch.manual_seed(0)
    result = CanonicalizeClamps()(qc.capture_model(Clamped(low, high).eval(), (x,)))
    return result.program, len(result.changes)


def test_golden(golden: Golden) -> None:
    program, _ = canonical(0.0, math.inf, torch.randn(2, 16))
    golden("canonicalize-clamps", str(program))


@settings(max_examples=12, deadline=None)
@given(
    low=st.sampled_from([-math.inf, -0.5, 0.0]),
    high=st.sampled_from([0.1, 0.5, math.inf, None]),
)
def test_values_stay_bit_for_bit(low: float, high: float | None) -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 3
    program, changes = canonical(low, high, x)
    assert changes == int(low == -math.inf or high == math.inf)
    torch.manual_seed(0)
    assert torch.equal(program(x), Clamped(low, high)(x))


def test_the_exported_file_holds_no_infinity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16)
    program = qc.capture_model(Clamped(0.0, math.inf).eval(), (x,))
    quantized = qc.quantize_groups(program, qc.QuantSpec(group_size=8))
    path = tmp_path / "model.onnx"
    qc.export_model(quantized, path, qc.ExportSpec(target="onnx"))
    report = qc.verify_equivalence(quantized, path, [(x,)], qc.Tolerance(max_abs=1e-5))
    assert report.passed, report.first_divergence


def test_quantized_programs_are_refused() -> None:
    program = qc.quantize_groups(qc.capture_model(Clamped(0.0, math.inf), (torch.randn(2, 16),)))
    with pytest.raises(PreconditionError, match="quantized"):
        CanonicalizeClamps()(program)


def test_a_bound_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: CanonicalizeClamps, program: qc.Program) -> PassResult:
        return PassResult(program.evolve())

    monkeypatch.setattr(CanonicalizeClamps, "call", nothing)
    with pytest.raises(PostconditionError, match="bound"):
        canonical(0.0, math.inf, torch.randn(2, 16))

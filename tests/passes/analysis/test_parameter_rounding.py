"""What float16 scales and zero-points move, against the weights themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.api.export import decide_parameters
from qalora_compile.ir.program import Program
from qalora_compile.passes.analysis.parameter_rounding import PARAMETER_LIMIT, parameter_rounding
from tests.models import MLP, adapted
from tests.verify.planted import with_tensors


def folded(bits: int = 4) -> qc.Program:
    x = torch.randn(2, 64)
    spec = qc.QuantSpec(bits=bits, group_size=16)
    return qc.fold_adapters(adapted(MLP(64, 48, 40).eval(), (x,), spec))


def on_the_grid(program: qc.Program) -> qc.Program:
    """The program with scales and zero-points that float16 holds."""
    changes = {}
    for site in program.plan.weights_to_quantize():
        changes[f"{site.path}.scale"] = lambda s: torch.full_like(s, 2.0**-6)
        changes[f"{site.path}.offset"] = lambda o: torch.full_like(o, -(2.0**-3))
    return with_tensors(program, changes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_is_the_largest_movement_of_a_weight(bits: int) -> None:
    program = folded(bits)
    found = parameter_rounding(program, torch.float16)
    assert found is not None
    exact, half = (
        lower(program, qc.ExportSpec(parameter_dtype=dtype)).tensors()
        for dtype in ("float32", "float16")
    )
    codes, most = torch.arange(2**bits, dtype=torch.float64)[:, None, None], 0.0
    for site in program.plan.weights_to_quantize():
        weights = []
        for tensors in (exact, half):
            scale, zero = (tensors[f"{site.path}.{n}"].double() for n in ("scale", "zero_point"))
            weights.append(scale * (codes - zero))
        step = exact[f"{site.path}.scale"].double()
        most = max(most, float(((weights[1] - weights[0]).abs() / step).max()))
    assert found.steps == pytest.approx(most, rel=1e-3)
    assert not found.negligible


def test_float32_is_negligible_and_what_float16_holds_does_not_move() -> None:
    program = folded()
    found = parameter_rounding(program, torch.float32)
    assert found is not None
    assert 0 < found.steps < 1e-5
    exact = parameter_rounding(on_the_grid(program), torch.float16)
    assert exact is not None
    assert exact.steps == 0
    assert exact.negligible


def test_a_value_beyond_float16_moves_infinitely() -> None:
    program = folded()
    path = program.plan.weights_to_quantize()[-1].path
    program = with_tensors(program, {f"{path}.scale": lambda s: s * 1e9})
    found = parameter_rounding(program, torch.float16)
    assert found is not None
    assert (found.steps, found.where) == (float("inf"), path)


def test_auto_takes_float16_only_where_nothing_moves() -> None:
    program, spec = folded(), qc.ExportSpec(parameter_dtype="auto")
    assert decide_parameters(program, spec).parameter_dtype == "float32"
    assert decide_parameters(on_the_grid(program), spec).parameter_dtype == "float16"
    tensors = lower(on_the_grid(program), spec).tensors()
    assert {t.dtype for n, t in tensors.items() if n.endswith(".scale")} == {torch.float16}
    assert 0 < PARAMETER_LIMIT < 2**-8, "float16 zero-points of 8 to 16 are further apart"


def test_values_in_a_file_are_measured(tmp_path: Path) -> None:
    program = folded()
    program.save(tmp_path / "folded")
    lazy = Program.load(tmp_path / "folded", lazy=True)
    assert parameter_rounding(lazy, torch.float16) == parameter_rounding(program, torch.float16)

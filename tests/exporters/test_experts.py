"""Stacked experts in ONNX Runtime: every form of them, against torch, at sizes never captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers the operator
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.onnx import write_onnx
from tests.models import adapted, scale_of, worst

TOLERANCE = qc.Tolerance(max_rel=1e-4)


class Grouped(nn.Module):
    """Rows sorted by expert; the last row belongs to none if `gap`."""

    def __init__(self, k: int = 40, n: int = 24, *, gap: bool = False) -> None:
        super().__init__()
        self.head, self.gap = nn.Linear(n, 16), gap
        self.experts = nn.Parameter(torch.randn(3, k, n) / 6)

    def forward(self, x: Tensor) -> Tensor:
        """Half of `[T, K]` to the first expert, none to the second, the rest to the last."""
        rows = torch.ones_like(x[:, 0], dtype=torch.int32).sum(0, dtype=torch.int32)
        last = rows - 1 if self.gap else rows
        ends = torch.stack([rows // 2, rows // 2, last]).to(torch.int32)
        # The operator that transformers takes for float32 experts on the CPU.
        y: Tensor = self.head(torch.ops.transformers.grouped_mm_fallback(x, self.experts, ends))
        return y


def exported(program: qc.Program, folder: Path, **options: Any) -> Path:
    path = folder / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(**options))
    return path


def assert_equal(program: qc.Program, path: Path) -> None:
    calls = [(torch.randn(rows, 40),) for rows in (2, 11, 30)]
    report = qc.verify_equivalence(program, path, calls, TOLERANCE)
    assert report.passed, str(report)


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (2, 32), (3, 24), (8, 8)])
def test_grouped_experts(bits: int, group: int, gap: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, spec = Grouped(gap=gap), qc.QuantSpec(bits=bits, group_size=group)
    program = adapted(model, (torch.randn(8, 40),), spec)
    assert program.plan["experts"].experts == 3
    folded = qc.fold_adapters(program)
    x = torch.randn(7, 40)
    assert worst(program(x), folded(x)) < 1e-5 * scale_of(program(x))
    assert_equal(folded, exported(folded, tmp_path))


@pytest.mark.parametrize("gap", [False, True])
def test_float_experts_next_to_a_quantized_layer(gap: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = qc.capture_model(Grouped(gap=gap).eval(), (torch.randn(8, 40),))
    program = qc.quantize_groups(program, exclude=["experts"])
    assert_equal(program, exported(program, tmp_path))


def test_adapters_that_are_not_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = adapted(Grouped(gap=True), (torch.randn(8, 40),), qc.QuantSpec(group_size=8))
    assert_equal(program, exported(program, tmp_path, allow_unfolded=True))


def test_the_correction_of_one_expert_is_missed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folded = qc.fold_adapters(adapted(Grouped(), (torch.randn(8, 40),)))
    spec = qc.ExportSpec(target="ort-stock")
    lowered = lower(folded, spec)
    (path,) = {s.path for s in folded.plan.to_quantize() if s.experts}
    lowered.tensors()[f"{path}.2.correction"].zero_()
    write_onnx(lowered, tmp_path / "model.onnx", spec)
    report = qc.verify_equivalence(
        folded, tmp_path / "model.onnx", [(torch.randn(9, 40),)], TOLERANCE
    )
    assert not report.passed
    assert report.first_divergence == "experts"


class Asserts(nn.Module):
    """Checks its own input at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """An assertion on values, and an output that is none."""
        torch._assert_async((x.abs() < 100).all(), "too large")
        return self.fc(x), None


def test_run_time_assertions_and_none_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = qc.quantize_groups(qc.capture_model(Asserts().eval(), (torch.randn(4, 32),)))
    path = exported(program, tmp_path)
    report = qc.verify_equivalence(program, path, [(torch.randn(7, 32),)], TOLERANCE)
    assert report.passed and len(report.outputs) == 1


class NoTranslation(nn.Module):
    """Uses an operator that ONNX has not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """A determinant of a lazily chosen kind."""
        return torch.special.airy_ai(self.fc(x))


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    program = qc.quantize_groups(qc.capture_model(NoTranslation().eval(), (torch.randn(4, 32),)))
    with pytest.raises(UnsupportedError, match="special_airy_ai"):
        exported(program, tmp_path)
    assert not list(tmp_path.iterdir())

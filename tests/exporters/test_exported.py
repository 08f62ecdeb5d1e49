"""The graph for torch.onnx: lifted as it is, or traced again where it has to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.api import complete_spec, lower
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.exporters.onnx import exported, model
from qalora_compile.exporters.onnx.exported import TranslatableProgram, lift, retrace
from qalora_compile.runtime import open_session
from tests.models import gpt2, llama

pytestmark = pytest.mark.usefixtures("translated_anew")
FLOAT = qc.ExportSpec(allow_unfolded=True)


def export(module: nn.Module, x: Tensor, path: Path) -> tuple[qc.Program, np.ndarray[Any, Any]]:
    """A float model in ONNX Runtime, on other numbers of rows than it was captured with."""
    program = qc.capture_model(module.eval(), (x,))
    qc.export_model(program, path, FLOAT)
    session = open_session(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return program, y


@pytest.fixture
def retraced(monkeypatch: pytest.MonkeyPatch) -> list[qc.Program]:
    """The programs that were traced again."""
    seen: list[qc.Program] = []

    def record(program: qc.Program) -> Any:
        seen.append(program)
        return retrace(program)

    monkeypatch.setattr(model, "retrace", record)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["standard", "none"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_language_models_are_not_traced_again(
    build: Any, fusion: str, tmp_path: Path, retraced: list[qc.Program]
) -> None:
    program = qc.quantize_groups(capture_causal_lm(build()))
    report = qc.export_model(program, tmp_path / "lifted.onnx", qc.ExportSpec(fusion=fusion))
    assert not retraced
    monkey = pytest.MonkeyPatch()
    monkey.setattr(model, "lift", lambda program: None)
    again = qc.export_model(program, tmp_path / "traced.onnx", qc.ExportSpec(fusion=fusion))
    monkey.undo()
    assert len(retraced) == 1
    assert report.nodes <= 1.05 * again.nodes
    stored = [
        {t.name for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer}
        for name in ("lifted", "traced")
    ]
    weights = [{name for name in names if not name.startswith("val_")} for names in stored]
    assert weights[0] == weights[1]


class WritesInPlace(nn.Module):
    """Adds to its own intermediate value."""

    def forward(self, x: Tensor) -> Tensor:
        """(x + 1) · 2, written into one tensor."""
        y = x + 1
        y.mul_(2)
        return y


class WritesIntoAView(nn.Module):
    """Adds to a row of its own intermediate value."""

    def forward(self, x: Tensor) -> Tensor:
        """x + 1, and the first row once more."""
        y = x + 1
        y[0].add_(1)
        return y


class WritesOfAnotherType(nn.Module):
    """Adds numbers of a wider type, which the written tensor has no room for."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the integer part of x, in 32 bits."""
        y = x.to(torch.int32) * 1
        y.add_(x.to(torch.int64))
        return y


@pytest.mark.parametrize(
    ("build", "lifted"),
    [(WritesInPlace, True), (WritesIntoAView, False), (WritesOfAnotherType, False)],
)
def test_operators_that_write_where_it_shows_are_traced_again(
    build: type[nn.Module], lifted: bool, tmp_path: Path, retraced: list[qc.Program]
) -> None:
    x = torch.randn(3, 4)
    program, y = export(build(), x, tmp_path / "model.onnx")
    assert isinstance(lift(program), TranslatableProgram) == lifted
    assert len(retraced) == (not lifted)
    expected = build()(x)
    assert y.dtype == expected.numpy().dtype
    np.testing.assert_allclose(y, expected, rtol=1e-6)


class TwoNames(nn.Module):
    """The smaller and the larger of two tensors, by torch's second names."""

    def forward(self, x: Tensor) -> Tensor:
        """min(x, x²) + max(x, 1)."""
        return torch.min(x, x * x) + torch.max(x, torch.ones_like(x))


def test_second_names_are_translated(tmp_path: Path, retraced: list[qc.Program]) -> None:
    x = torch.randn(3, 4)
    _, y = export(TwoNames(), x, tmp_path / "model.onnx")
    assert not retraced
    np.testing.assert_array_equal(y, TwoNames()(x))


class Reversed(nn.Module):
    """Holds a subtraction from a number, which torch.onnx translates as two operators."""

    def forward(self, x: Tensor) -> Tensor:
        """2 − x."""
        return 2 - x


@pytest.mark.parametrize(
    ("module", "lifted"),
    [(Reversed(), True), (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), False)],
    ids=["no translation", "made of others"],
)
def test_operators_without_a_translation_are_decomposed(
    module: nn.Module, lifted: bool, tmp_path: Path, retraced: list[qc.Program]
) -> None:
    x = torch.randn(3, 4)
    program, y = export(module, x, tmp_path / "model.onnx")
    assert isinstance(lift(program), TranslatableProgram) == lifted
    assert len(retraced) == 1
    np.testing.assert_allclose(y, module(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_translation_that_torch_never_uses_is_not_used(
    tmp_path: Path, retraced: list[qc.Program]
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0]

    module, x = Recurrent().eval(), torch.randn(3, 5, 4)
    _, y = export(module, x, tmp_path / "model.onnx")
    assert len(retraced) == 1
    np.testing.assert_allclose(y, module(x).detach(), rtol=1e-5, atol=1e-6)


class Casts(nn.Module):
    """What torch.onnx has decomposed: casts, masks joined with operators."""

    def forward(self, x: Tensor) -> Tensor:
        """Where 0 < x < 1 or x > 2, x, else 0; and bits of its integer part."""
        mask = (x > 0) & (x < 1) | (x > 2)
        integers = x.to(torch.int64)
        bits = (integers & integers.flip(0)) | integers.flip(1)
        return x * mask.to(x.dtype) + bits.to(torch.float32).to(x.device)


def test_casts_and_joined_masks_are_translated(tmp_path: Path, retraced: list[qc.Program]) -> None:
    x = torch.tensor([[-1.0, 0.5, 1.5, 3.5], [0.25, 7.0, -4.0, 2.5]])
    _, y = export(Casts(), x, tmp_path / "model.onnx")
    assert not retraced
    np.testing.assert_array_equal(y, Casts()(x))


def test_recorded_shapes_are_not_relied_on(tmp_path: Path) -> None:
    program = qc.quantize_groups(capture_causal_lm(llama()))
    lowered = lower(program, complete_spec(program, qc.ExportSpec()))
    wrong = lowered.copy_graph()
    for node in wrong.nodes:
        if node.op == "call_function":
            node.meta["val"] = torch.empty(7, 7, dtype=torch.float64, device="meta")
    found = lift(lowered.evolve(graph=wrong))
    assert found is not None
    for node in found.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, Tensor) or value.dtype != torch.float64


def test_axes_of_one_name_have_one_symbol() -> None:
    program = qc.quantize_groups(capture_causal_lm(llama()))
    found = lift(lower(program, complete_spec(program, qc.ExportSpec())))
    assert found is not None
    pasts = {
        str(node.meta["val"].shape[2])
        for node in found.graph.nodes
        if node.op == "placeholder" and node.name.startswith("past_key_values")
    }
    assert len(pasts) == 1


def test_a_planted_fault_in_the_propagation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    program = qc.quantize_groups(capture_causal_lm(llama()))
    lowered = lower(program, complete_spec(program, qc.ExportSpec()))
    monkeypatch.setattr(exported, "propagate", lambda graph, program, tensors: {})
    bare = lowered.copy_graph()
    for node in bare.nodes:
        node.meta.pop("val", None)
    with pytest.raises(Exception, match="val"):
        lift(lowered.evolve(graph=bare))

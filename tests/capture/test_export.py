"""What capture says of axes that a model fixes, and of models that it cannot trace."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.errors import CaptureError
from tests.models import MLP, llama, scale_of, token_ids, worst

pytestmark = pytest.mark.usefixtures("traced_anew")


class FixedSequence(nn.Module):
    """Adds a table of one size: the second axis of its input cannot vary."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Parameter(torch.randn(6, 32)), nn.Linear(32, 8)

    def forward(self, states: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """States `[B, 6, 32]`, and a dictionary."""
        y: Tensor = self.fc(states + self.table + extra["more"])
        return y


def test_a_note_names_each_axis_that_is_fixed() -> None:
    states = torch.randn(3, 6, 32)
    program = qc.capture_model(FixedSequence(), (states, {"more": states}))
    assert any("states" in note and "axis 1 is fixed" in note for note in program.notes)
    assert not any("axis 0" in note for note in program.notes)
    other = torch.randn(5, 6, 32)
    assert program(other, {"more": other}).shape == (5, 6, 8)


class Branches(nn.Module):
    """Control flow by a value."""

    def forward(self, x: Tensor) -> Tensor:
        """Two paths."""
        if x.sum() > 0:  # the line to be named
            return x + 1
        return x - 1


class OddInput(nn.Module):
    """Takes an object that torch.export does not know."""

    def forward(self, x: Tensor, other: object) -> Tensor:
        """Ignores it."""
        return x * 2


class Unknown:
    """No pytree."""


@pytest.mark.parametrize(
    ("model", "args", "line", "hint"),
    [
        (Branches(), (), "if x.sum() > 0", "control flow depends on tensor values"),
        (OddInput(), (Unknown(),), "", "register other types"),
    ],
    ids=["branches", "input"],
)
def test_an_error_names_the_line_and_what_to_change(
    model: nn.Module, args: tuple[object, ...], line: str, hint: str
) -> None:
    with pytest.raises(CaptureError) as info:
        qc.capture_model(model, (torch.randn(4, 8), *args))
    text = str(info.value)
    assert line in text and hint in text
    assert not line or "test_export.py:" in text


@pytest.mark.slow
def test_the_hint_for_a_model_that_returns_its_cache() -> None:
    model = llama()
    model.config.use_cache = True  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match="use_cache=False"):
        qc.capture_model(model, (token_ids(2, 16),))
    assert qc.capture_model(model, (token_ids(2, 16),), {"use_cache": False}).signature.outputs


def test_dynamic_axes_that_cannot_vary_are_explained() -> None:
    states = torch.randn(3, 6, 32)
    shapes = {"states": {1: torch.export.Dim("s")}, "extra": {"more": None}}
    with pytest.raises(CaptureError, match="leave it out of dynamic_shapes"):
        qc.capture_model(FixedSequence(), (states, {"more": states}), dynamic_shapes=shapes)


def test_recurrent_layers_are_captured_without_a_warning() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(x)[0][:, -1])
            return y

    model, x = Recurrent(), torch.randn(3, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = qc.capture_model(model, (x,))
    assert worst(program(x), model(x)) < 1e-6


def test_a_symbolic_trace_is_captured_and_folded() -> None:
    torch.manual_seed(0)
    model = fx.symbolic_trace(MLP(64, 64, 8))
    x = torch.randn(4, 64)
    program = qc.insert_adapters(qc.quantize_groups(qc.capture_model(model, (x,))))
    assert [s.name for s in program.plan.to_quantize()] == ["layers.0", "layers.1"]
    y = torch.randn(9, 64)
    assert worst(program(y), qc.fold_adapters(program)(y)) <= 1e-5 * scale_of(program(y))

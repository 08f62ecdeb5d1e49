"""Weights and biases in uncommon places: quantized rightly, or kept with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.runtime import open_session
from tests.models import assert_close, scale_of, worst


class TiedAutoencoder(nn.Module):
    """The decoder is the transpose of the encoder."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, k, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Encode, then decode."""
        return functional.linear(torch.tanh(functional.linear(x, self.weight)), self.weight.t())


@pytest.mark.parametrize(("k", "n"), [(16, 16), (16, 12)])
def test_one_weight_used_plain_and_transposed(k: int, n: int) -> None:
    """Groups of one are exact, so any difference is a weight read in the wrong orientation."""
    model, x = TiedAutoencoder(k, n), torch.randn(3, k, dtype=torch.float64)
    program = qc.capture_model(model, (x,))
    try:
        quantized = qc.quantize_groups(program, qc.QuantSpec(bits=8, group_size=1))
    except UserInputError:
        return  # both uses kept in float
    assert worst(quantized(x), model(x)) <= 1e-9 * scale_of(model(x))


class Residual(nn.Module):
    """`addmm` adds a full matrix here: it is not a bias of N values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        """A residual step in one operator."""
        hidden = torch.tanh(self.fc(x))
        return torch.addmm(hidden, hidden, self.weight)


def quantized_residual() -> tuple[qc.Program, Tensor]:
    """The model above at 8 bits."""
    x = torch.randn(3, 16)
    program = qc.capture_model(Residual().eval(), (x,))
    return qc.quantize_groups(program, qc.QuantSpec(bits=8, group_size=8)), x


def test_a_matrix_added_by_addmm_trains() -> None:
    program, x = quantized_residual()
    adapted = qc.insert_adapters(program)
    adapted(x).sum().backward()
    assert all(p.grad is not None for p in adapted.adapter_parameters())


def test_a_matrix_added_by_addmm_is_exported(tmp_path: Path) -> None:
    program, x = quantized_residual()
    qc.export_model(program, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx")
    (found,) = session.run(None, {"x": x.numpy()})
    assert_close(torch.from_numpy(found), program(x), relative=1e-4)

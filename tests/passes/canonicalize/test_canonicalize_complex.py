"""canonicalize-complex: complex numbers become pairs, and what is computed stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.passes.canonicalize import canonicalize_complex as module
from qalora_compile.passes.canonicalize.canonicalize_complex import CanonicalizeComplex
from tests.models import slow, worst
from tests.zoo.architectures import build

Golden = Callable[[str, str], None]


class Rotary(nn.Module):
    """Rotary embedding as Meta's Llama has it, its table a complex buffer."""

    table: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(32.0), 1 / 100 ** (torch.arange(0, width, 2) / width))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, width]` → the same."""
        y = self.proj(x)
        numbers = torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2))
        rotated = numbers * self.table[: x.shape[1]].unsqueeze(0)
        return torch.view_as_real(rotated).flatten(-2)


class Mixed(nn.Module):
    """Everything that the pass knows how to write."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = torch.complex(x, y), torch.polar(x.abs(), y)
        c = (a * b + a - b) * 0.5
        d = (c * x).transpose(-1, -2).unsqueeze(-1).squeeze(-1)
        e = d.permute(0, -1, 1)[:, 1:].select(-1, 0).to(torch.complex64)
        return e.real * 2 + e.imag


def rewritten(model: nn.Module, *inputs: Tensor) -> tuple[qc.Program, int]:
    result = CanonicalizeComplex()(qc.capture_model(model.eval(), inputs))
    return result.program, len(result.changes)


def complex_nodes(program: qc.Program) -> list[str]:
    targets = (*module._MAKE, *module._READ)
    return [node.name for node in program.graph.nodes if node.target in targets]


def test_golden(golden: Golden) -> None:
    program, changes = rewritten(Rotary(), torch.randn(2, 5, 8))
    assert changes
    golden("canonicalize-complex", str(program))


def test_a_table_of_complex_numbers_is_stored_as_pairs() -> None:
    model, x = Rotary(), torch.randn(2, 5, 8)
    program, _ = rewritten(model, x)
    assert not any(tensor.is_complex() for tensor in program.tensors().values())
    assert worst(program(x), model(x)) < 1e-6
    longer = torch.randn(3, 9, 8)
    assert worst(program(longer), model(longer)) < 1e-6


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(shape=st.tuples(*[st.integers(2, 5)] * 3), seed=st.integers(0, 99))
def test_the_function_stays(shape: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=generator) for _ in "ab")
    program, _ = rewritten(Mixed(), x, y)
    assert not complex_nodes(program)
    assert worst(program(x, y), Mixed()(x, y)) < 1e-4


@pytest.mark.parametrize("name", [*slow("DeepseekV2ForCausalLM"), "Llama4ForCausalLM"])
def test_rotary_embeddings_of_transformers(name: str) -> None:
    model = build(name)
    ids = torch.arange(24).reshape(2, 12)
    call: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    captured = qc.capture_model(model, (), call)
    assert complex_nodes(captured)
    program = CanonicalizeComplex()(captured).program
    assert not complex_nodes(program)
    with torch.no_grad():
        assert torch.allclose(program(**call)["logits"], model(**call).logits, atol=1e-5)


def test_the_exported_file_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Rotary(16), torch.randn(2, 5, 16)
    program = qc.quantize_groups(qc.capture_model(model.eval(), (x,)), qc.QuantSpec(group_size=8))
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target="onnx"))
    report = qc.verify_equivalence(program, path, [(x,)], qc.Tolerance(max_abs=1e-5))
    assert report.passed


def test_other_uses_leave_the_graph_as_it_is() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(torch.view_as_real(torch.complex(x, x)).flatten(-2)).abs()

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.complex(x, x) + 1)

    for model in (Spectrum(), Shifted()):
        x = torch.randn(2, 6)
        program, changes = rewritten(model, x)
        assert worst(program(x), model(x)) < 1e-5
        assert bool(changes) is isinstance(model, Spectrum)  # the pair itself is no matter of fft


def test_without_complex_numbers_nothing_changes() -> None:
    x = torch.randn(2, 8)
    captured = qc.capture_model(nn.Linear(8, 8), (x,))
    result = CanonicalizeComplex()(captured)
    assert not result.changes and str(result.program.graph) == str(captured.graph)


def test_quantized_programs_are_refused() -> None:
    program = qc.quantize_groups(qc.capture_model(Rotary(16), (torch.randn(2, 5, 16),)))
    with pytest.raises(PreconditionError, match="quantized"):
        CanonicalizeComplex()(program)


def test_a_number_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Rewrite, "run", lambda self, numbers: ())
    with pytest.raises(PostconditionError, match="complex"):
        rewritten(Rotary(), torch.randn(2, 5, 8))

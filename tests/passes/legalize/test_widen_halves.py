"""widen-halves: float32 arithmetic on the same stored halves, and nothing half left in between."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.errors import PostconditionError, UnsupportedError
from qalora_compile.passes import PassResult
from qalora_compile.passes.legalize.widen_halves import WidenHalves, needs_widening
from tests.models import MLP, OneLinear, adapted, assert_close, worst

Golden = Callable[[str, str], None]
HALVES = [torch.float16, torch.bfloat16]


class Rounding(nn.Module):
    """Casts to half with several operators, and makes half tensors."""

    shift: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16, dtype=dtype)
        self.register_buffer("shift", torch.randn(16, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """A norm in float32, as many language models have it."""
        y = self.fc(x)
        wide = y.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(y.dtype)
        ones = torch.ones(normed.shape, dtype=normed.dtype)
        return self.fc(normed + ones + self.shift.type_as(normed))


def test_golden(golden: Golden) -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    program = qc.capture_model(OneLinear(8, 4).to(torch.bfloat16).eval(), (x,))
    golden("widen-halves", str(WidenHalves()(program).program))


@pytest.mark.parametrize("dtype", HALVES)
def test_it_is_the_model_with_its_weights_widened(dtype: torch.dtype) -> None:
    model, x = Rounding(dtype).eval(), torch.randn(3, 16, dtype=dtype)
    program = qc.capture_model(model, (x,))
    result = WidenHalves()(program)
    assert len(result.changes) == 3
    wide = result.program
    assert wide.signature.inputs[0].dtype == "float32"
    assert wide(x.float()).dtype == torch.float32
    twin = copy.deepcopy(model).float()
    assert_close(wide(x.float()), twin(x.float()), relative=1e-6)
    assert {t.dtype for t in wide.tensors().values()} == {dtype}, "the stored tensors stay"
    assert not needs_widening(wide, stored=False)


@pytest.mark.parametrize("dtype", HALVES)
def test_folding_is_exact_once_widened(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40, dtype=dtype)
    program = adapted(MLP(40, 24, 8).to(dtype).eval(), (x,))
    before = WidenHalves()(program).program
    after = WidenHalves()(qc.fold_adapters(program)).program
    assert worst(before(x.float()), program(x)) > 1e-5, "half arithmetic rounds"
    assert_close(after(x.float()), before(x.float()), relative=1e-6)


def test_a_float32_model_is_left_alone() -> None:
    program = adapted(MLP(32, 8).eval(), (torch.randn(2, 32),))
    assert not needs_widening(program)
    result = WidenHalves()(program)
    assert not result.modified
    assert str(result.program) == str(program)
    assert "widen" not in str(lower(qc.fold_adapters(program), qc.ExportSpec()).history)


def test_the_bits_of_a_half_are_not_reinterpreted() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.float16)

    program = qc.capture_model(Bits(), (torch.zeros(2, 4, dtype=torch.int16),))
    with pytest.raises(UnsupportedError, match="bits"):
        WidenHalves()(program)


def test_a_half_that_is_left_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    program = qc.capture_model(Rounding(torch.bfloat16).eval(), (x,))

    def lazy(self: WidenHalves, program: qc.Program) -> PassResult:
        return PassResult(program.evolve(graph=program.copy_graph()))

    monkeypatch.setattr(WidenHalves, "call", lazy)
    with pytest.raises(PostconditionError, match="half precision is left"):
        WidenHalves()(program)

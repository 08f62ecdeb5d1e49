"""The cross-check restores what it touches, and finds planted faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.eager.check import cross_check
from qalora_compile.eager.layers import AdaptedLinear
from qalora_compile.errors import CaptureError, VerificationError
from qalora_compile.verify.compare import Report
from tests.models import MLP


def make() -> tuple[qc.Program, MLP, Tensor]:
    torch.manual_seed(0)
    model, x = MLP(64, 64, 64, 8), torch.randn(4, 64)
    program = qc.adapt_module_(model, (x,), adapter=qc.AdapterSpec(rank=4))
    return program, model, x


def test_adapters_and_modes_are_as_before() -> None:
    program, model, x = make()
    model.train()
    model.layers[1].eval()
    program.train()
    before = {n: p.detach().clone() for n, p in program.named_adapter_parameters()}
    report = cross_check(program, model, (x,), {})
    assert report.passed and [row.name for row in report.outputs] == [
        "output 0 (no_grad)",
        "output 0 (grad)",
    ]
    assert [m.training for m in model.layers] == [True, False, True]
    assert model.training and program.module.training
    for name, parameter in program.named_adapter_parameters():
        assert torch.equal(parameter, before[name])


def _drop_adapter(layer: AdaptedLinear) -> None:
    layer.lora_B = nn.Parameter(torch.zeros_like(layer.lora_B))


def _wrong_scaling(layer: AdaptedLinear) -> None:
    object.__setattr__(layer.adapted, "scaling", layer.adapted.scaling * 1.01)


def _wrong_pool(layer: AdaptedLinear) -> None:
    with torch.no_grad():
        layer.lora_A = nn.Parameter(layer.lora_A.flip(-1))


def _lost_bias(layer: AdaptedLinear) -> None:
    layer.register_parameter("bias", None)


FAULTS = (_drop_adapter, _wrong_scaling, _wrong_pool, _lost_bias)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_a_planted_fault_is_found(fault: Callable[[AdaptedLinear], None]) -> None:
    program, model, x = make()
    layer = model.layers[1]
    assert isinstance(layer, AdaptedLinear)
    fault(layer)
    with pytest.raises(VerificationError, match="differs by") as info:
        cross_check(program, model, (x,), {})
    assert isinstance(info.value.report, Report)
    assert all(row.max_rel > 1e-4 for row in info.value.report.outputs)


def test_outputs_that_are_not_finite_do_not_pass() -> None:
    program, model, x = make()
    last = model.layers[2]
    assert isinstance(last, AdaptedLinear)
    last.bias = nn.Parameter(torch.full((8,), float("nan")))
    with pytest.raises(VerificationError, match="output 0"):
        cross_check(program, model, (x,), {})


class Random(nn.Module):
    """Gives other values in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Noise that no mode switches off."""
        return self.fc(x) + torch.randn(8)


class OneMore(Random):
    """Returns another shape where no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        """A shorter output outside of capture."""
        y: Tensor = self.fc(x)
        return y if torch.is_grad_enabled() or torch.compiler.is_compiling() else y[:1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Random, "does not compute what the model does"), (OneMore, "return different tensors")],
)
def test_a_model_that_its_capture_does_not_compute_is_refused(
    kind: type[nn.Module], message: str
) -> None:
    model = kind()
    with pytest.raises(CaptureError, match=message):
        qc.adapt_module_(model, (torch.randn(4, 64),))
    assert type(model.fc) is nn.Linear

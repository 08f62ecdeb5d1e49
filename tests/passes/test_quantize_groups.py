"""quantize-groups: packed codes in place of weights, once a storage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.config import QuantSpec
from qalora_compile.errors import InternalError, PreconditionError, UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.passes import quantize_groups as pass_module
from qalora_compile.quantizers.minmax import quantize_minmax
from tests.models import MLP, OneLinear, SquareConv1D, UsedTwice, assert_close, bert, gpt2

Golden = Callable[[str, str], None]


def quantized(model: nn.Module, x: Tensor, **options: int) -> qc.Program:
    return qc.quantize_groups(qc.capture_model(model.eval(), (x,)), QuantSpec(**options))  # type: ignore[arg-type]


def test_golden(golden: Golden) -> None:
    golden("quantize-groups", str(quantized(MLP(16, 24, 8), torch.randn(2, 16), group_size=8)))


def dequantized(model: MLP, spec: QuantSpec) -> MLP:
    """The eager model with its weights replaced by what the quantizer makes of them."""
    replaced = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in replaced.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(quantize_minmax(parameter, spec).dequantize())
    return replaced


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.integers(1, 40),
    k=st.integers(1, 33),
    seed=st.integers(0, 99),
)
def test_the_program_is_the_model_with_dequantized_weights(
    bits: int, group: int, k: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = MLP(k, 12, 5).double(), torch.randn(3, k, dtype=torch.float64)
    spec = QuantSpec(bits=bits, group_size=group)
    program = quantized(model, x, bits=bits, group_size=group)
    assert_close(program(x), dequantized(model, spec)(x), relative=1e-12)


def test_a_square_conv1d_is_read_the_right_way_round() -> None:
    model, x = SquareConv1D(64), torch.randn(3, 64)
    assert_close(quantized(model, x, bits=8)(x), model(x), relative=0.02)


def test_a_missed_transpose_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = SquareConv1D(64), torch.randn(3, 64)
    right = quantized(model, x, bits=8)

    def transposed(weight: Tensor, spec: QuantSpec) -> GroupAffine:
        return quantize_minmax(weight.t(), spec)

    monkeypatch.setattr(pass_module, "get_quantizer", lambda method: transposed)
    wrong = quantized(model, x, bits=8)
    tolerance = qc.Tolerance(max_rel=0.05)
    assert not qc.verify_equivalence(right, wrong, [(x,)], tolerance).passed


def test_a_dropped_tail_group_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(weight: Tensor, spec: QuantSpec) -> GroupAffine:
        full = quantize_minmax(weight, spec)
        return GroupAffine(full.codes, full.scale[:, :-1], full.offset[:, :-1], 4, spec.group_size)

    monkeypatch.setattr(pass_module, "get_quantizer", lambda method: short)
    with pytest.raises(UserInputError, match="scale is"):
        quantized(MLP(20, 4), torch.randn(2, 20), group_size=8)


def test_a_bias_added_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16)
    right = quantized(OneLinear(16, 4), x)
    name = "fc.bias"
    twice = nn.Parameter(right.tensors()[name] * 2, requires_grad=False)
    wrong = right.evolve(graph=right.copy_graph(), tensors=right.tensors() | {name: twice})
    report = qc.verify_equivalence(right, wrong, [(x,)], qc.Tolerance(max_rel=1e-3))
    assert not report.passed
    assert report.first_divergence == "fc"


def test_a_weight_used_twice_is_stored_once() -> None:
    program = quantized(UsedTwice(), torch.randn(2, 32))
    assert sorted(n for n in program.tensors() if n.endswith("qweight")) == [
        "head.qweight",
        "shared.qweight",
    ]
    assert not any(n.endswith(".weight") for n in program.tensors()), "no float copy is left"


def test_the_users_model_is_left_alone() -> None:
    model = bert()
    before = {n: p.clone() for n, p in model.named_parameters()}
    ids = torch.randint(0, 128, (2, 8))
    program = quantized(model, ids)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])
    assert not any(p.requires_grad for p in program.module.parameters())


def test_half_precision_weights_are_quantized_from_their_values() -> None:
    model, x = MLP(32, 8).to(torch.bfloat16), torch.randn(2, 32).to(torch.bfloat16)
    program = quantized(model, x, bits=8)
    assert program.tensors()["layers.0.scale"].dtype == torch.float32
    assert program(x).dtype == torch.bfloat16
    expected = model.float()(x.float())
    assert_close(program(x).float(), expected, relative=0.02)


def test_a_model_without_a_linear_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    with pytest.raises(UserInputError, match="no linear layer to quantize"):
        quantized(model, torch.randn(2, 1, 8))


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"bits": 0}, {"group_size": 0}, {"group_size": -1}]
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserInputError):
        QuantSpec(**options)  # type: ignore[arg-type]


def test_quantizing_twice_is_refused() -> None:
    program = quantized(MLP(16, 8), torch.randn(2, 16))
    with pytest.raises(PreconditionError, match="stage"):
        qc.quantize_groups(program)


def test_a_quantizer_that_fails_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Tensor, spec: QuantSpec) -> GroupAffine:
        raise ZeroDivisionError

    monkeypatch.setattr(pass_module, "get_quantizer", lambda method: broken)
    with pytest.raises(InternalError, match="quantize-groups failed"):
        quantized(MLP(16, 8), torch.randn(2, 16))


def test_addmm_sites_of_gpt2_are_quantized() -> None:
    model, ids = gpt2(), torch.randint(0, 128, (2, 8))
    program = quantized(model, ids, bits=8)
    assert {s.kind for s in program.plan.to_quantize()} == {"addmm"}
    with torch.no_grad():
        assert_close(program(ids), model(ids), relative=0.02)

"""legalize-onnx: blocked DequantizeLinear, exact for every size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.spec import GROUP_SUM, MATMUL_BLOCKS, validate
from qalora_compile.passes.legalize import legalize_onnx as pass_module
from qalora_compile.passes.legalize.legalize_onnx import LegalizeOnnx
from tests.models import MLP, OneLinear, UsedTwice, adapted, assert_close
from tests.passes.legalize.test_legalize_ort import folded

Golden = Callable[[str, str], None]


def test_golden(golden: Golden) -> None:
    golden("legalize-onnx", str(LegalizeOnnx()(folded()[0]).program))
    golden("legalize-onnx-padded", str(LegalizeOnnx()(folded(3, 24, 40)[0]).program))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 7, 16, 24, 32, 48, 100, 576])
@pytest.mark.parametrize("k", [33, 64])
def test_every_size_is_exact(bits: int, group: int, k: int) -> None:
    program, x = folded(bits, group, k)
    lowered = LegalizeOnnx()(program).program
    validate(lowered)
    assert_close(lowered(x), program(x), relative=1e-5)


def test_no_correction_where_zero_points_are_integers() -> None:
    model = OneLinear(32, 4)
    with torch.no_grad():  # levels −8 … 7 with scale 1: zero-point 8 exactly
        model.fc.weight.copy_(torch.arange(128).reshape(4, 32).remainder(16) - 8.0)
    program = qc.quantize_groups(qc.capture_model(model.eval(), (torch.randn(2, 32),)))
    lowered = LegalizeOnnx()(program).program
    assert not any(n.target is GROUP_SUM for n in lowered.graph.nodes)


def test_codes_packed_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = folded()
    real = pass_module.pack_flat

    def permuted(codes: Tensor, bits: int) -> Tensor:
        packed = real(codes, bits)
        return (packed >> 4) | (packed << 4)

    monkeypatch.setattr(pass_module, "pack_flat", permuted)
    wrong = LegalizeOnnx()(program).program
    report = qc.verify_equivalence(program, wrong, [(x,)], qc.Tolerance(max_rel=1e-4))
    assert not report.passed
    assert report.first_divergence == "layers.0"


def test_a_weight_used_twice_is_lowered_once() -> None:
    x = torch.randn(2, 40)
    program = qc.fold_adapters(adapted(UsedTwice(40).eval(), (x,)))
    result = LegalizeOnnx()(program)
    assert [c.path for c in result.changes] == ["shared", "head"]
    assert sum(n.target is MATMUL_BLOCKS for n in result.program.graph.nodes) == 3
    assert_close(result.program(x), program(x), relative=1e-5)


def test_float64_is_refused() -> None:
    x = torch.randn(2, 40, dtype=torch.float64)
    program = qc.quantize_groups(qc.capture_model(MLP(40, 8).double().eval(), (x,)))
    with pytest.raises(UnsupportedError, match="DequantizeLinear has no float64 kernel"):
        LegalizeOnnx()(program)

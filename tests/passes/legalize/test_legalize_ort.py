"""legalize-ort: real-valued zero-points, exact for every size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.ops.target_kernels import GroupQuantLinear, group_quant_linear
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.spec import GROUP_QUANT_LINEAR, validate
from qalora_compile.passes.legalize import legalize_ort as pass_module
from qalora_compile.passes.legalize.base import Layer
from qalora_compile.passes.legalize.legalize_ort import GroupLayout, LegalizeOrt, lower_groups
from tests.models import (
    MLP,
    OneLinear,
    UsedTwice,
    adapted,
    assert_close,
    llama,
    randomize_adapters,
    token_ids,
)

Golden = Callable[[str, str], None]


@functools.cache
def captured(k: int) -> tuple[qc.Program, Tensor]:
    x = torch.randn(4, k, generator=torch.Generator().manual_seed(3))
    return qc.capture_model(MLP(k, 24, 8).eval(), (x,)), x


def folded(bits: int = 4, group: int = 16, k: int = 48) -> tuple[qc.Program, Tensor]:
    program, x = captured(k)
    program = qc.quantize_groups(program, qc.QuantSpec(bits=bits, group_size=group))
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=4))
    return qc.fold_adapters(randomize_adapters(program, 0.1)), x


def test_golden(golden: Golden) -> None:
    golden("legalize-ort", str(LegalizeOrt()(folded()[0]).program))
    golden("legalize-ort-padded", str(LegalizeOrt()(folded(3, 24, 40)[0]).program))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 7, 16, 24, 32, 48, 100, 576])
@pytest.mark.parametrize("k", [33, 64])
def test_every_size_is_exact(bits: int, group: int, k: int) -> None:
    program, x = folded(bits, group, k)
    lowered = LegalizeOrt()(program).program
    validate(lowered)
    assert_close(lowered(x), program(x), relative=1e-5)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.integers(1, 70),
    k=st.integers(1, 80),
    shift=st.floats(-1e4, 1e4),
    seed=st.integers(0, 9),
)
def test_the_weight_comes_back_from_its_parts(
    bits: int, group: int, k: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, groups = 3, -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, groups, generator=generator)
    scale[0, 0], scale[1, -1] = 0.0, 1e-44  # the quotient of the second is no float
    offset = torch.randn(n, groups, generator=generator) + shift
    packed = pack_codes(codes, bits)
    layer = Layer(bits, group, k)
    parts = lower_groups(packed, scale, offset, layer, torch.float32)
    layout = GroupLayout.choose(layer)
    eye = torch.eye(k, dtype=torch.float64)
    x = torch.ops.qalora.pad_groups(eye, layout.group_size, layout.width)
    y = group_quant_linear(
        x if layout.padded else eye, parts["qweight"], parts["scale"].double(),
        parts["zero_point"].double(), bits, layout.width, "fp32",
    )  # fmt: skip
    expected = dequantize(packed, scale.double(), offset.double(), bits=bits, group_size=group, k=k)
    assert_close(y.t(), expected, relative=1e-6)


def test_a_transformer_and_its_counts() -> None:
    ids = token_ids(2, 16)
    program = qc.fold_adapters(adapted(llama(), (ids,)))
    lowered = LegalizeOrt()(program).program
    assert_close(lowered(ids), program(ids), relative=1e-4)
    count = sum(n.target is GROUP_QUANT_LINEAR for n in lowered.graph.nodes)
    assert count == len(program.plan.to_quantize())


def test_half_parameters_round_and_say_so() -> None:
    program, x = folded()
    result = LegalizeOrt(parameter_dtype="float16")(program)
    assert "rounded to float16" in result.changes[0].why
    assert result.program.tensors()["layers.0.scale"].dtype == torch.float16
    assert_close(result.program(x), program(x), relative=2e-2)
    difference = (result.program(x) - program(x)).abs().max()
    assert difference > 0


@pytest.mark.parametrize(
    ("weight", "words"), [(1e-9, "too small for float16"), (1e7, "does not fit float16")]
)
def test_what_does_not_fit_half_is_refused(weight: float, words: str) -> None:
    model = OneLinear(32, 4)
    with torch.no_grad():
        model.fc.weight.mul_(weight)
    program = qc.quantize_groups(qc.capture_model(model.eval(), (torch.randn(2, 32),)))
    with pytest.raises(UserInputError, match=words):
        LegalizeOrt(parameter_dtype="float16")(program)
    LegalizeOrt()(program)


def swap_nibbles(parts: dict[str, Tensor]) -> None:
    q = parts["qweight"]
    parts["qweight"] = (q >> 4) | (q << 4)


def round_zero_points(parts: dict[str, Tensor]) -> None:
    parts["zero_point"] = parts["zero_point"].round()


def negate_zero_points(parts: dict[str, Tensor]) -> None:
    parts["zero_point"] = -parts["zero_point"]


def lose_tail(parts: dict[str, Tensor]) -> None:
    parts["scale"] = parts["scale"].clone()
    parts["scale"][:, -1] = 0


FAULTS = [swap_nibbles, round_zero_points, negate_zero_points, lose_tail]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_lowering_is_caught(
    fault: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x = folded()

    def wrong(*args: Any) -> dict[str, Tensor]:
        parts = lower_groups(*args)
        fault(parts)
        return parts

    monkeypatch.setattr(pass_module, "lower_groups", wrong)
    lowered = LegalizeOrt()(program).program
    report = qc.verify_equivalence(program, lowered, [(x,)], qc.Tolerance(max_rel=1e-4))
    assert not report.passed
    assert report.first_divergence == "layers.0"


def test_a_weight_used_twice_is_lowered_once() -> None:
    x = torch.randn(2, 40)
    program = qc.fold_adapters(adapted(UsedTwice(40).eval(), (x,)))
    result = LegalizeOrt()(program)
    assert [c.path for c in result.changes] == ["shared", "head"]
    assert sum(n.target is GROUP_QUANT_LINEAR for n in result.program.graph.nodes) == 3
    assert_close(result.program(x), program(x), relative=1e-5)


@pytest.mark.parametrize(("level", "compute"), [(0, "fp32"), (2, "int16"), (4, "int8")])
def test_an_accuracy_level_is_an_attribute_and_changes_no_reference(
    level: int, compute: str
) -> None:
    program, x = folded()
    lowered = LegalizeOrt(accuracy_level=level)(program).program
    nodes = [n for n in lowered.graph.nodes if n.target is GROUP_QUANT_LINEAR]
    assert {GroupQuantLinear.of(node).compute for node in nodes} == {compute}
    assert_close(lowered(x), program(x), relative=1e-5)


def test_unfolded_adapters_stay() -> None:
    x = torch.randn(4, 40)
    program = adapted(MLP(40, 24, 8).eval(), (x,))
    lowered = LegalizeOrt()(program).program
    assert_close(lowered(x), program(x), relative=1e-5)
    assert len(lowered.adapter_parameters()) == 4


def test_bad_requests_are_refused() -> None:
    x = torch.randn(2, 40, dtype=torch.float64)
    program = qc.quantize_groups(qc.capture_model(MLP(40, 8).double().eval(), (x,)))
    with pytest.raises(UnsupportedError, match="GroupQuantLinear has no float64 kernel"):
        LegalizeOrt()(program)
    with pytest.raises(PreconditionError):
        LegalizeOrt()(LegalizeOrt()(folded()[0]).program)
    with pytest.raises(UserInputError):
        LegalizeOrt(accuracy_level=3)
    with pytest.raises(UserInputError):
        LegalizeOrt(parameter_dtype="bfloat16")

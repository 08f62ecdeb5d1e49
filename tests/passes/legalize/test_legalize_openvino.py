"""legalize-openvino: the tensors of OpenVINO's compressed products, exact for every size."""

from __future__ import annotations

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.ops.target_kernels import ExpertGroupQuantLinear, GroupQuantLinear
from qalora_compile.ir.spec import EXPERT_GROUP_QUANT_LINEAR, GROUP_QUANT_LINEAR, validate
from qalora_compile.passes.legalize.legalize_openvino import LegalizeOpenvino
from tests.exporters.test_experts import Grouped
from tests.models import OneLinear, adapted, assert_close
from tests.passes.legalize.test_legalize_ort import folded


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [7, 16, 48, 100])
@pytest.mark.parametrize("k", [33, 64])
def test_every_size_is_exact(bits: int, group: int, k: int) -> None:
    program, x = folded(bits, group, k)
    lowered = LegalizeOpenvino()(program).program
    validate(lowered)
    assert lowered.stage == "legalized:openvino"
    assert_close(lowered(x), program(x), relative=1e-5)


@pytest.mark.parametrize(("bits", "stored"), [(2, 2), (3, 4), (4, 4), (8, 8)])
def test_codes_are_stored_in_a_type_that_openvino_has(bits: int, stored: int) -> None:
    lowered = LegalizeOpenvino()(folded(bits, 16)[0]).program
    nodes = [node for node in lowered.graph.nodes if node.target is GROUP_QUANT_LINEAR]
    assert {GroupQuantLinear.of(node).bits for node in nodes} == {stored}
    assert tuple(lowered.tensors()["layers.0.qweight"].shape) == (24, 3, 16 * stored // 8)


@pytest.mark.parametrize(("group", "stored"), [(7, 16), (32, 32), (48, 16), (96, 96), (100, 16)])
def test_groups_that_openvino_computes_wrongly_are_divided(group: int, stored: int) -> None:
    program, x = folded(4, group, 192)
    lowered = LegalizeOpenvino()(program).program
    nodes = [node for node in lowered.graph.nodes if node.target is GROUP_QUANT_LINEAR]
    width = GroupQuantLinear.of(nodes[0]).group_size
    assert width == stored
    assert_close(lowered(x), program(x), relative=1e-5)


def test_float16_parameters_are_checked() -> None:
    program, x = folded(4, 16)
    result = LegalizeOpenvino(parameter_dtype="float16")(program)
    assert result.program.tensors()["layers.0.scale"].dtype == torch.float16
    assert "rounded to float16" in str(result.changes[0])
    assert_close(result.program(x), program(x), relative=5e-3)
    with pytest.raises(UserInputError, match="parameter_dtype is 'int8'"):
        LegalizeOpenvino(parameter_dtype="int8")


def test_models_in_half_precision_are_widened_first() -> None:
    x = torch.randn(2, 48, dtype=torch.bfloat16)
    program = qc.fold_adapters(adapted(OneLinear(48, 16).eval().bfloat16(), (x,)))
    with pytest.raises(PreconditionError, match="computes in bfloat16"):
        LegalizeOpenvino()(program)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 24), (8, 8)])
def test_each_expert_has_tensors_of_its_own(bits: int, group: int) -> None:
    quant = qc.QuantSpec(bits=bits, group_size=group)
    program = qc.fold_adapters(adapted(Grouped(), (torch.randn(8, 40),), quant))
    lowered = LegalizeOpenvino()(program).program
    validate(lowered)
    (node,) = (n for n in lowered.graph.nodes if n.target is EXPERT_GROUP_QUANT_LINEAR)
    assert len(ExpertGroupQuantLinear.of(node).codes) == 3
    x = torch.randn(11, 40)
    assert_close(lowered(x), program(x), relative=1e-5)

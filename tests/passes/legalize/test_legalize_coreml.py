"""legalize-coreml: codes in the element types of Core ML, exact for every size."""

from __future__ import annotations

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.ops.target_kernels import GroupQuantLinear
from qalora_compile.ir.spec import GROUP_QUANT_LINEAR, validate
from qalora_compile.passes.legalize.legalize_coreml import LegalizeCoreml
from tests.exporters.test_experts import Grouped
from tests.models import adapted, assert_close
from tests.passes.legalize.test_legalize_ort import folded


@pytest.mark.parametrize(("bits", "stored"), [(2, 4), (3, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize(("group", "width"), [(7, 16), (16, 16), (48, 48), (100, 64)])
def test_every_size_is_exact(bits: int, stored: int, group: int, width: int) -> None:
    program, x = folded(bits, group, 64)
    lowered = LegalizeCoreml()(program).program
    validate(lowered)
    assert lowered.stage == "legalized:coreml"
    nodes = [node for node in lowered.graph.nodes if node.target is GROUP_QUANT_LINEAR]
    first = GroupQuantLinear.of(nodes[0])
    assert (first.bits, first.group_size) == (stored, width)
    assert_close(lowered(x), program(x), relative=1e-5)


def test_stacked_experts_are_refused() -> None:
    program = qc.fold_adapters(adapted(Grouped(), (torch.randn(8, 40),)))
    with pytest.raises(UnsupportedError, match="stacked experts have no form in target coreml"):
        LegalizeCoreml()(program)

"""fuse-multi-head: masks of any shape are added, and of no other number of heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.ir.spec import MULTI_HEAD_ATTENTION
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.fusions import fuse_multi_head
from qalora_compile.passes.fusions.fuse_attention import FuseAttention
from qalora_compile.passes.fusions.fuse_multi_head import FuseMultiHead
from tests.models import llama, worst
from tests.passes.fusions.models import Biased, targets
from tests.passes.fusions.test_fusions import padded_call


@pytest.mark.parametrize("shape", [(5, 5), (4, 5, 5), (1, 1, 5, 5), (2, 4, 5, 5)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_any_shape_are_added(shape: tuple[int, ...], boolean: bool) -> None:
    x = torch.randn(2, 5, 16).double()
    mask: Tensor = torch.rand(shape) > 0.4 if boolean else torch.randn(shape).double()
    if boolean:
        mask[..., 0] = True
    program = qc.capture_model(Biased().eval(), (x, mask), dynamic_shapes={"x": None, "mask": None})
    result = FuseMultiHead()(FuseAttention()(program).program)
    assert not result.skips
    assert targets(result.program).count(MULTI_HEAD_ATTENTION) == 1
    assert worst(result.program(x, mask), program(x, mask)) < 1e-13


def test_a_mask_of_an_unknown_number_of_heads_is_left_with_a_reason() -> None:
    x, mask = torch.randn(2, 5, 16), torch.ones(2, 4, 5, 5).bool()
    program = FuseAttention()(qc.capture_model(Biased().eval(), (x, mask))).program
    result = FuseMultiHead()(program)
    assert not result.modified
    (skip,) = result.skips
    assert skip.why == "the number of heads of the mask is not known"
    assert (skip.path, skip.at) == ("attention_default", "mask")


def test_a_planted_fault_in_the_groups_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture_causal_lm(llama().double())
    call = padded_call(program)
    monkeypatch.setattr(
        fuse_multi_head._Biases,
        "_numbers",
        lambda self, mask, dtype: mask.graph.call_function(torch.ops.aten.to.dtype, (mask, dtype)),
    )
    assert (
        worst(
            Pipeline([FuseAttention(), FuseMultiHead()])(program).program(**call), program(**call)
        )
        > 1e-3
    )

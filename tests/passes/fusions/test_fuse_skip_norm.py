"""fuse-skip-norm: norms of sums are found where they fit, and left with a reason elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.ir.spec import SKIP_RMS_NORM
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.fusions.fuse_rms_norm import FuseRmsNorm
from qalora_compile.passes.fusions.fuse_skip_norm import FuseSkipNorm
from tests.models import worst
from tests.passes.fusions.models import Norm, Summed, targets

REASONS = {
    "": None,
    "factor": ("add", "the sum has a factor (alpha is 2)"),
    "broadcast": ("add", "the shapes of the summands differ"),
    "read before": ("rms_norm_default", "the sum is read before the norm is computed"),
    "two axes": ("add_1", "the sum has not three axes"),
    "flattened": None,
}


@pytest.mark.parametrize(("odd", "reason"), REASONS.items())
def test_norms_of_sums_are_found_where_they_fit(odd: str, reason: tuple[str, str] | None) -> None:
    x, y = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    program = FuseRmsNorm()(qc.capture_model(Summed(odd).double().eval(), (x, y))).program
    result = FuseSkipNorm()(program)
    assert targets(result.program).count(SKIP_RMS_NORM) == (not odd)
    assert worst(result.program(x, y), program(x, y)) < 1e-13
    assert [(skip.at, skip.why) for skip in result.skips] == ([reason] if reason else [])


def test_the_sum_of_a_layer_and_its_bias_keeps_its_name() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(32, 8), Norm(8, "llama")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x))

    x = torch.randn(2, 3, 32)
    program = qc.quantize_groups(qc.capture_model(Layer().eval(), (x,)))
    lowered = Pipeline.parse("legalize-ort-stock,fuse-rms-norm")(program).program
    (skip,) = FuseSkipNorm()(lowered).skips
    assert skip.why == "the sum is the output of a layer"

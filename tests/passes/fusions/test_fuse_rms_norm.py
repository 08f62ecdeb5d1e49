"""fuse-rms-norm: the forms that models write, and near misses by their reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.ir.spec import RMS_NORM
from qalora_compile.passes.fusions.fuse_rms_norm import FuseRmsNorm
from tests.models import worst
from tests.passes.fusions.models import Norm, targets


@given(width=st.integers(1, 40), form=st.sampled_from(["llama", "gemma"]))
@settings(max_examples=10)
def test_norms_of_models_are_found(width: int, form: str) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    program = qc.capture_model(Norm(width, form).double().eval(), (x,))
    result = FuseRmsNorm()(program)
    assert targets(result.program).count(RMS_NORM) == 1
    assert len(result.changes) == 1 and not result.skips
    assert worst(result.program(x), program(x)) < 1e-13


REASONS = {
    "other axis": ("mean_1", "the mean is not over the last axis (dim is [1])"),
    "unweighted": ("mul", "no product with a weight reads it, only the output"),
    "other x": ("add_1", "what is multiplied is not what was squared"),
    "matrix": ("matrix", "what is multiplied has not one axis"),
    "half": ("mul", "no product with a weight reads it, only aten.to.dtype"),
}


@pytest.mark.parametrize("form", REASONS)
def test_what_looks_like_a_norm_is_left_with_a_reason(form: str) -> None:
    result = FuseRmsNorm()(qc.capture_model(Norm(8, form).eval(), (torch.randn(2, 3, 8),)))
    assert not result.modified
    (skip,) = result.skips
    assert (skip.path, (skip.at, skip.why)) == ("rsqrt", REASONS[form])


@pytest.mark.parametrize("form", ["cubed", "standard deviation"])
def test_other_roots_are_left_without_a_word(form: str) -> None:
    result = FuseRmsNorm()(qc.capture_model(Norm(8, form).eval(), (torch.randn(2, 3, 8),)))
    assert not result.modified and not result.skips


class Perturbed(nn.Module):
    """A norm with a few of its parts changed."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.weight, self.parts = nn.Parameter(torch.randn(4)), parts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm, and something else that reads its parts."""
        eps, dim, keep = (self.parts[name] for name in ("eps", "dim", "keepdim"))
        square = (
            x.pow(self.parts["exponent"]).abs()
            if self.parts["abs"]
            else x.pow(self.parts["exponent"])
        )
        mean = square.mean(dim, keepdim=keep)
        root = torch.rsqrt(mean + 1e-5) if eps == "inside" else torch.rsqrt(mean) + 1e-5
        if eps == "first":
            root = torch.rsqrt(1e-5 + mean)
        normed = root * x if self.parts["swap"] else x * root
        y = normed * self.weight if self.parts["swap"] else self.weight * normed
        extra = {"": y, "root": root, "normed": normed, "mean": mean}[self.parts["reader"]]
        return y, extra.cos()


@pytest.mark.slow
@given(
    parts=st.fixed_dictionaries(
        {
            "eps": st.sampled_from(["inside", "first", "outside"]),
            "dim": st.sampled_from([-1, -1, 1, 2]),
            "keepdim": st.sampled_from([True, True, False]),
            "exponent": st.sampled_from([2, 2, 4]),
            "abs": st.booleans(),
            "swap": st.booleans(),
            "reader": st.sampled_from(["", "root", "normed", "mean"]),
        }
    )
)
@settings(max_examples=12)
def test_a_changed_norm_fuses_to_the_same_numbers_or_has_a_reason(parts: dict[str, Any]) -> None:
    x = torch.randn(4, 4, 4).double()
    program = qc.capture_model(Perturbed(**parts).double().eval(), (x,))
    result = FuseRmsNorm()(program)
    assert worst(result.program(x), program(x)) < 1e-13
    norm = parts["dim"] == -1 and parts["keepdim"] and parts["exponent"] == 2 and not parts["abs"]
    assert result.modified == (norm and parts["eps"] != "outside")
    names = {node.name for node in program.graph.nodes}
    assert all(skip.why and skip.at in names for skip in result.skips)
    looks_like_it = parts["eps"] != "outside" and not parts["abs"]
    if not result.modified:
        assert len(result.skips) == looks_like_it

"""fuse-rotary: rotations of halves are found, others are left with a reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qalora_compile as qc
from qalora_compile.ir.spec import ROTARY_EMBEDDING
from qalora_compile.passes.fusions.fuse_rotary import FuseRotary
from tests.models import worst
from tests.passes.fusions.models import Rotated, targets

UNKNOWN_TABLE = "cos and sin are not seen to be computed from two equal halves"


@pytest.mark.parametrize("part", [8, 4])
def test_rotary_embeddings_are_found(part: int) -> None:
    x, positions = torch.randn(2, 3, 16).double(), torch.arange(6.0).double().view(2, 3)
    program = qc.capture_model(Rotated(part=part).double().eval(), (x, positions))
    result = FuseRotary()(program)
    assert targets(result.program).count(ROTARY_EMBEDDING) == 1
    assert not result.skips
    assert worst(result.program(x, positions), program(x, positions)) < 1e-14


REASONS = {
    "halves differ": ("sin", UNKNOWN_TABLE),
    "difference": ("mul_4", "no aten.add.Tensor reads it, only aten.sub.Tensor"),
    "other x": ("exp", "cos and the two halves belong to different values"),
    "unequal parts": ("cat_1", "what changes places is not the two halves of what is rotated"),
}


@pytest.mark.parametrize("odd", [*REASONS, "no minus", "neighbours"])
def test_other_rotations_are_left_with_a_reason(odd: str) -> None:
    x, positions = torch.randn(2, 3, 16), torch.arange(6.0).view(2, 3)
    result = FuseRotary()(qc.capture_model(Rotated(odd).eval(), (x, positions)))
    assert not result.modified
    assert [(s.at, s.why) for s in result.skips] == ([REASONS[odd]] if odd in REASONS else [])


def test_rows_of_unknown_heads_are_left_with_a_reason() -> None:
    class Headless(torch.nn.Module):
        def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
            table = torch.cat([angle, angle], -1)
            crossed = torch.cat([-x[..., 4:], x[..., :4]], -1)
            return x * table.cos() + crossed * table.sin()

    program = qc.capture_model(Headless().eval(), (torch.randn(2, 3, 8), torch.randn(2, 3, 4)))
    (skip,) = FuseRotary()(program).skips
    assert skip.why == "the number of heads is not known"


@pytest.mark.slow
@given(
    odd=st.sampled_from(["", *REASONS, "no minus", "neighbours", "gap"]),
    part=st.sampled_from([4, 8, 12]),
    width=st.sampled_from([12, 16]),
)
@settings(max_examples=10)
def test_a_changed_rotation_fuses_to_the_same_numbers_or_is_left(
    odd: str, part: int, width: int
) -> None:
    x, positions = torch.randn(2, 3, 48).double(), torch.arange(6.0).double().view(2, 3)
    model = Rotated(odd, width, part).double().eval()
    program = qc.capture_model(model, (x, positions))
    result = FuseRotary()(program)
    assert result.modified == (odd in ("", "gap"))
    assert worst(result.program(x, positions), program(x, positions)) < 1e-13
    assert all(skip.why for skip in result.skips)

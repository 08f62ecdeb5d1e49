"""Branches on sizes: a size for which one goes differently is refused, or computed like eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.verify.inputs import sample_inputs
from tests.models import llama, token_ids, worst

pytestmark = pytest.mark.usefixtures("traced_anew")


class SizeBranch(nn.Module):
    """Takes another path for long inputs, as models with a length limit do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Twice as much above three rows."""
        y = self.fc(x)
        return y * 2 if x.shape[0] > 3 else y


@pytest.mark.parametrize(("captured", "called"), [(4, 2), (3, 6)])
def test_a_size_on_the_other_side_of_a_branch(captured: int, called: int) -> None:
    model = SizeBranch().eval()
    program = qc.capture_model(model, (torch.randn(captured, 8),))
    x = torch.randn(called, 8)
    try:
        found = program(x)
    except UserInputError:
        return
    assert worst(found, model(x)) == 0.0


def test_the_range_survives_storage_and_guides_samples(tmp_path: Path) -> None:
    program = qc.capture_model(SizeBranch().eval(), (torch.randn(3, 8),))
    program.save(tmp_path / "p")
    again = qc.Program.load(tmp_path / "p")
    (limit,) = again.signature.ranges
    assert (limit.name, limit.low, limit.high) == ("batch", 0, 3)
    with pytest.raises(UserInputError, match="the graph holds for 0 to 3"):
        again(torch.randn(6, 8))
    for call in sample_inputs(again, 3):
        again(**call)


def test_a_model_without_branches_has_no_range() -> None:
    assert qc.capture_model(llama(), (token_ids(2, 8),)).signature.ranges == ()


def test_sizes_on_the_same_side_still_vary() -> None:
    model = SizeBranch().eval()
    program = qc.capture_model(model, (torch.randn(4, 8),))
    x = torch.randn(9, 8)
    assert worst(program(x), model(x)) == 0.0

"""A value that rounding decides, such as a softmax between two nearly equal large scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.verdict import Verdict
from qalora_compile.verify import NumericReport, compare_nodes

UNIT = 2.0**-24
_SLOPE = 1e9


class Chooses(nn.Module):
    """Selects one of two rows by which of two scores is larger: `x · w`, or a bound next to it."""

    bound: Tensor

    def __init__(self, weight: Tensor, bound: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("bound", torch.tensor([bound], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        score = x @ self.weight
        chosen = torch.softmax(_SLOPE * torch.stack([score, self.bound.expand_as(score)], -1), -1)
        return chosen @ torch.eye(2)


def compared(distance: float, change: float) -> NumericReport:
    """Compare two programs whose scores differ by `change` roundings.

    The bound is `distance` roundings above the score of the reference.
    """
    weight, x = torch.tensor([0.5, 0.25]), torch.ones(1, 2)
    bound = 0.75 * (1 + distance * 2 * UNIT)
    changed = weight * (1 + change * 2 * UNIT)
    a, b = (qc.capture_model(Chooses(w, bound), (x,)) for w in (weight, changed))
    return compare_nodes(a, b, {"ones": {"x": x}})


def test_a_choice_between_scores_that_differ_by_some_roundings_is_not_compared() -> None:
    report = compared(distance=3, change=4)  # the candidate chooses the other row
    rows = {row.name: row for row in report.modes[0].rows}
    outputs = [row for name, row in rows.items() if name.startswith("output")]
    assert [(row.worst.checked, row.worst.undefined) for row in outputs] == [(0, 2)]
    assert outputs[0].worst.error > 0.99 and outputs[0].worst.own > 0.99
    assert report.verdict is not Verdict.DIFFERENT
    assert any("no output is checked on ones" in note for note in report.notes)


def test_a_choice_between_distant_scores_is_compared() -> None:
    report = compared(distance=150, change=200)
    assert report.verdict is Verdict.DIFFERENT and "output" in str(report)
    (worst,) = [row.worst for row in report.modes[0].rows if row.kind == "output"]
    assert worst.checked == 2 and worst.error > 0.99 and worst.own < 1e-6


def test_a_mistake_in_a_well_conditioned_value_is_not_excused() -> None:
    weight, x = torch.randn(16), torch.randn(4, 16)

    class Plain(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.weight)

    a, b = (qc.capture_model(Plain(w), (x,)) for w in (weight, weight * (1 + 2000 * UNIT)))
    report = compare_nodes(a, b, {"x": {"x": x}})
    assert report.verdict is Verdict.DIFFERENT

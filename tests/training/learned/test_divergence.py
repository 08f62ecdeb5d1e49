"""The divergence from stored rows: exact, with the right slope, and 0 for equal models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.training.learned import divergence
from qalora_compile.training.learned.divergence import Divergence, TeacherRows

ALL = slice(None)


def rows(seed: int, count: int, width: int, size: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * size


def outcomes(teacher: TeacherRows, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the stored tokens and of all others together, by another computation."""
    p = logits.softmax(-1)
    kept = p.gather(-1, teacher.index.long())
    return kept, (1 - kept.sum(-1, keepdim=True)).clamp_min(0)


@given(st.integers(0, 99), st.integers(1, 5), st.integers(2, 40), st.integers(1, 45))
def test_it_is_the_divergence_of_the_stored_outcomes(
    seed: int, count: int, width: int, kept: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "_KEPT", kept)
        truth, guess = rows(seed, count, width), rows(seed + 1, count, width).requires_grad_()
        teacher = TeacherRows.of(truth)
    found, slope = Divergence(teacher)(guess.detach(), ALL, slope=True)
    p, q = outcomes(teacher, truth), outcomes(teacher, guess)
    expected = sum(
        (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum()
        for a, b in zip(p, q, strict=True)
    )
    if kept >= width:  # nothing is left: the rest is rounding
        expected = (p[0] * (p[0].log() - q[0].log())).sum()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    (exact,) = torch.autograd.grad(expected, guess)
    assert slope is not None
    assert torch.allclose(slope, exact, rtol=1e-5, atol=1e-6)


def test_equal_models_do_not_diverge() -> None:
    logits = rows(0, 4, 300)
    found, slope = Divergence(TeacherRows.of(logits))(logits, ALL, slope=True)
    assert slope is not None
    assert abs(float(found)) < 1e-9
    assert float(slope.abs().max()) < 1e-9


def test_a_row_takes_two_kilobytes_of_any_vocabulary() -> None:
    teacher = TeacherRows.of(rows(0, 3, 5000).float())
    size = sum(t.numel() * t.element_size() for t in vars(teacher).values())
    assert size == 3 * (256 * 8 + 4)


def test_large_logits_stay_finite() -> None:
    teacher = TeacherRows.of(rows(0, 3, 400, 200.0).float())
    found, slope = Divergence(teacher)(rows(1, 3, 400, 200.0).float(), ALL, slope=True)
    assert slope is not None
    assert bool(torch.isfinite(found)) and bool(torch.isfinite(slope).all())

"""Ranks that move between layers in training: the budget, the choice, the same when resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.safetensors_io import load_tensors, save_tensors
from qalora_compile.sealed import digests_of, read_sealed, write_sealed
from qalora_compile.training import FitSpec, FitState, fit
from qalora_compile.training.forward.adaptive_rank import RankAllocator, budget_at
from qalora_compile.training.hf_trainer import trainer_arguments
from qalora_compile.training.records.checkpoint import RANKS, STATE, list_checkpoints
from qalora_compile.training.records.report_page import layer_changes
from tests.models import slow, worst
from tests.training.records.test_checkpoint import go_on, stop_at
from tests.training.test_fit import EXAMPLES, ROWS, adapters, language_model

SPEC = FitSpec(steps=20, batch_size=3, learning_rate=1e-2, lora_plus_ratio=4.0, seed=3)
ADAPTIVE = dataclasses.replace(SPEC, adaptive_rank=1.5)


def ranks(program: qc.Program) -> dict[str, int]:
    return {change.path: change.rank for change in layer_changes(program)}


@given(steps=st.integers(1, 200), ranks=st.integers(2, 500), share=st.floats(0.01, 0.99))
def test_the_budget_falls_from_all_ranks_to_the_target_and_stays(
    steps: int, ranks: int, share: float
) -> None:
    target = max(1, int(share * ranks))
    budgets = [budget_at(step, steps, ranks, target) for step in range(steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == ranks
    assert budgets[-1] == target
    assert budgets[int(0.1 * steps)] == ranks


def test_the_budget_is_cubic() -> None:
    assert [budget_at(step, 100, 1016, 16) for step in (10, 35, 60)] == [1016, 16 + 125, 16]


def pair(a: list[float], b: list[float]) -> dict[str, nn.Parameter]:
    """An adapter of ranks with one number in A and one in B each, and their gradients."""
    rows = torch.tensor(a, dtype=torch.float64)[:, None]
    columns = torch.tensor(b, dtype=torch.float64)[None]
    made = {"w.lora_A": nn.Parameter(rows), "w.lora_B": nn.Parameter(columns)}
    for parameter in made.values():
        parameter.grad = torch.ones_like(parameter)
    return made


def test_importance_is_the_smoothed_sensitivity_times_its_uncertainty() -> None:
    """Two steps, written out: the rank whose w · g changes counts more than a steady one."""
    named = pair([0.0, 0.0, 0.0], [2.0, 1.0, 3.0])
    allocator = RankAllocator(named.items(), target=1, steps=10)
    wanted = torch.zeros(3, dtype=torch.float64)
    mean, spread = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for values in ([2.0, 1.0, 3.0], [2.0, 9.0, 3.0]):
        named["w.lora_B"].data.copy_(torch.tensor([values]))
        now = torch.tensor(values, dtype=torch.float64)
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * (now - mean).abs()
        wanted = mean * spread
        scores = allocator._score("w.lora_B", named["w.lora_A"], named["w.lora_B"])
        torch.testing.assert_close(scores, wanted, rtol=1e-12, atol=0)
    assert int(wanted.argmax()) == 1
    allocator._choose(scores, 1)
    assert allocator.state["w.lora_B:kept"].tolist() == [0, 1, 0]


def test_a_rank_that_was_taken_away_can_come_back() -> None:
    named = pair([1.0, 1.0], [5.0, 1.0])
    allocator = RankAllocator(named.items(), target=1, steps=10)
    b = named["w.lora_B"]
    allocator.step(5)
    assert b.tolist() == [[5.0, 0.0]]
    for number in (5, 6):
        b.data.copy_(torch.tensor([[0.1, 60.0]]))  # the optimizer moves both
        allocator.step(number)
    assert b.tolist() == [[0.0, 60.0]]
    b.data.copy_(torch.tensor([[900.0, 1.0]]))
    allocator.step(7)
    assert b.tolist() == [[0.0, 1.0]], "in the last part the choice stays"


def test_training_ends_with_the_budget_and_folds() -> None:
    program = language_model()
    fit(program, EXAMPLES, ADAPTIVE)
    found = ranks(program)
    assert sum(found.values()) == round(1.5 * len(found))
    assert len(set(found.values())) > 1, "all layers got the same rank"
    ids = torch.tensor([ROWS[0]])
    folded = qc.fold_adapters(program)
    assert worst(folded(ids), program(ids)) < 1e-5
    assert qc.prove_equivalence(program, folded).passed


@pytest.mark.parametrize("kind", ["affine", "qat"])
def test_it_serves_the_other_kinds(kind: str) -> None:
    program = language_model(kind=kind)
    fit(program, EXAMPLES, ADAPTIVE)
    found = ranks(program)
    assert sum(found.values()) == round(1.5 * len(found))
    gains = [p for n, p in program.named_adapter_parameters() if n.endswith("adapter_gain")]
    assert all(bool(gain.any()) for gain in gains)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *[("lora", 1), ("affine", 8), ("qat", 15)],
        *slow(("lora", 8), ("lora", 15), ("affine", 1), ("affine", 15), ("qat", 1), ("qat", 8)),
    ],
)
def test_resuming_gives_the_same_weights_bit_for_bit(kind: str, step: int, tmp_path: Path) -> None:
    """Before, while and after the ranks move; with all parts that a kind trains."""
    uninterrupted = language_model(kind=kind)
    losses = fit(uninterrupted, EXAMPLES, ADAPTIVE).losses
    first = stop_at(step, language_model(kind=kind), ADAPTIVE, tmp_path)
    again = language_model(kind=kind)
    result = fit(again, EXAMPLES, ADAPTIVE, state=go_on(again, ADAPTIVE, tmp_path))
    assert (*first, *result.losses) == losses
    expected = adapters(uninterrupted)
    assert all(torch.equal(expected[n], p) for n, p in adapters(again).items())


def test_a_checkpoint_without_the_state_of_the_ranks_is_refused(tmp_path: Path) -> None:
    stop_at(8, language_model(), ADAPTIVE, tmp_path)
    folder = list_checkpoints(tmp_path)[-1].folder
    stored = load_tensors(folder / RANKS)
    del stored["model.layers.0.self_attn.q_proj.lora_B:AI"]
    save_tensors(stored, folder / RANKS)
    names = [path.name for path in folder.glob("*.safetensors")]
    state = read_sealed(folder / STATE)
    write_sealed(folder / STATE, state | {"files": digests_of(folder, names)})
    with pytest.raises(UserInputError, match="state of the ranks .* is missing in the file"):
        go_on(language_model(), ADAPTIVE, tmp_path)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_odd_targets_are_refused(target: float) -> None:
    with pytest.raises(UserInputError, match="adaptive_rank is"):
        FitSpec(adaptive_rank=target)


def test_a_target_above_the_ranks_is_refused() -> None:
    with pytest.raises(UserInputError, match="mean rank of 4: nothing can be taken"):
        FitState.fresh(language_model(), dataclasses.replace(SPEC, adaptive_rank=4.0))


def test_such_a_training_cannot_be_lengthened_or_given_to_a_trainer() -> None:
    constant = dataclasses.replace(SPEC, schedule="constant", warmup=0.0)
    longer = dataclasses.replace(constant, steps=40)
    assert longer.lengthens(20)
    assert not dataclasses.replace(longer, adaptive_rank=2.0).lengthens(20)
    with pytest.raises(UnsupportedError, match="does not move ranks"):
        trainer_arguments(ADAPTIVE)

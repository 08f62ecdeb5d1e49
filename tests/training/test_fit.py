"""The fit loop, evaluation and checkpoints on a tiny language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.training import Example, FitSpec, evaluate, fit
from qalora_compile.training.checkpoint import (
    KEPT,
    list_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from qalora_compile.training.evaluate import logits_of, program_forward
from qalora_compile.training.fit import StepReport, make_optimizer
from tests.models import MLP, llama, token_ids

ROWS = [tuple(range(start, start + 9)) for start in range(10, 16)]
EXAMPLES = [Example(row, row) for row in ROWS]  # counting: there is something to learn
SPEC = FitSpec(steps=8, batch_size=3, learning_rate=1e-2, seed=3)


def language_model() -> qc.Program:
    torch.manual_seed(1)
    program = qc.capture_model(llama().eval(), (token_ids(2, 8),))
    return qc.insert_adapters(qc.quantize_groups(program), qc.AdapterSpec(rank=4))


def adapters(program: qc.Program) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in program.named_adapter_parameters()}


def test_training_learns_and_moves_nothing_but_adapters() -> None:
    program = language_model()
    frozen = {n: t.clone() for n, t in program.tensors().items() if not t.requires_grad}
    before = evaluate(program_forward(program), EXAMPLES)
    result = fit(program, EXAMPLES, FitSpec(steps=60, batch_size=6, learning_rate=5e-2))
    after = evaluate(program_forward(program), EXAMPLES)
    assert after.loss < before.loss - 0.4
    assert after.token_accuracy > before.token_accuracy + 0.1
    assert result.losses[-1] < result.losses[0]
    assert not program.module.training
    for name, tensor in program.tensors().items():
        if name in frozen:
            assert torch.equal(tensor, frozen[name]), name
        else:
            assert bool(tensor.any()), f"{name} got no gradient"


def test_the_same_seed_gives_the_same_losses() -> None:
    first, again = (fit(language_model(), EXAMPLES, SPEC).losses for _ in range(2))
    assert first == again


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    spec = FitSpec(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [spec.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01


def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    whole = language_model()
    fit(whole, EXAMPLES, SPEC)
    half = language_model()

    def stop(report: StepReport, optimizer: torch.optim.Optimizer) -> bool:
        if report.step == 5:
            save_checkpoint(tmp_path, half, optimizer, step=5, seed=SPEC.seed)
        return report.step == 5

    assert fit(half, EXAMPLES, SPEC, on_step=stop).stopped
    again = language_model()
    optimizer = make_optimizer(again, SPEC)
    (checkpoint,) = list_checkpoints(tmp_path)
    restore_checkpoint(checkpoint, again, optimizer, seed=SPEC.seed)
    fit(again, EXAMPLES, SPEC, optimizer=optimizer, start_step=checkpoint.step)
    expected = adapters(whole)
    assert all(torch.equal(expected[n], p) for n, p in adapters(again).items())


def test_the_last_checkpoints_are_kept_and_hold_no_pickle(tmp_path: Path) -> None:
    program = language_model()
    optimizer = make_optimizer(program, SPEC)
    for step in range(1, 5):
        save_checkpoint(tmp_path, program, optimizer, step=step, seed=0)
    assert [c.step for c in list_checkpoints(tmp_path)] == [3, 4]
    assert len(list_checkpoints(tmp_path)) == KEPT
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".json", ".safetensors"}


def test_a_checkpoint_of_another_plan_or_seed_is_refused(tmp_path: Path) -> None:
    program = language_model()
    saved = save_checkpoint(tmp_path, program, make_optimizer(program, SPEC), step=1, seed=3)
    other = qc.capture_model(llama().eval(), (token_ids(2, 8),))
    other = qc.insert_adapters(qc.quantize_groups(other), qc.AdapterSpec(rank=2))
    with pytest.raises(UserInputError, match=r"is \[4, .*in the file"):
        restore_checkpoint(saved, other, make_optimizer(other, SPEC), seed=3)
    with pytest.raises(UserInputError, match="seed 3, not 4"):
        restore_checkpoint(saved, program, make_optimizer(program, SPEC), seed=4)


def test_a_loss_that_is_no_number_stops_and_names_the_step() -> None:
    program = language_model()
    name, parameter = next(program.named_adapter_parameters())
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(UserInputError, match="at step 1"):
        fit(program, EXAMPLES, SPEC)
    assert name


def test_programs_that_cannot_train_are_refused() -> None:
    program = language_model()
    with pytest.raises(PreconditionError, match="insert adapters"):
        fit(qc.fold_adapters(program), EXAMPLES, SPEC)
    with pytest.raises(UserInputError, match="no example"):
        fit(program, [], SPEC)


def test_a_model_without_logits_is_refused() -> None:
    program = qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    with pytest.raises(UnsupportedError, match="no language model"):
        logits_of(program(torch.randn(2, 16)))


@pytest.mark.parametrize("values", [{"steps": -1}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserInputError):
        FitSpec(**values)  # type: ignore[arg-type]


def test_metrics_are_counted_by_hand() -> None:
    """A model that always says token 2, with certainty."""

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*ids.shape, 4), -50.0)
        logits[..., 2] = 50.0
        return logits

    examples = [Example((1, 2, 2), (-100, 2, 2)), Example((1, 2, 3), (-100, 2, 3))]
    found = evaluate(forward, examples, choices=[1, 2])
    assert found.token_accuracy == 0.75
    assert found.exact_match == 0.5
    assert found.choice_accuracy == 1.0
    assert found.loss == pytest.approx(100 / 4)
    assert evaluate(forward, examples, choices=[1, 3]).choice_accuracy == 0.0

"""The fit loop and evaluation on a tiny language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any, overload

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.training import (
    Example,
    FitSpec,
    FitState,
    StepReport,
    evaluate,
    fit,
    make_optimizer,
    make_schedule,
)
from qalora_compile.training.evaluate import logits_of, program_forward
from qalora_compile.training.forward.autocast import has_bfloat16
from tests.models import MLP, assert_close, llama, token_ids

ROWS = [tuple(range(start, start + 9)) for start in range(10, 16)]
EXAMPLES = [Example(row, row) for row in ROWS]  # counting: there is something to learn
SPEC = FitSpec(steps=8, batch_size=3, learning_rate=1e-2, seed=3)


@cache
def quantized() -> qc.Program:
    torch.manual_seed(1)
    return qc.quantize_groups(qc.capture_model(llama().eval(), (token_ids(2, 8),)))


def language_model(*, init_b: float = 0.0, **adapter: Any) -> qc.Program:
    """The same weights in each call, with adapters of their own."""
    program = qc.insert_adapters(quantized(), qc.AdapterSpec(**{"rank": 4} | adapter))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in program.named_adapter_parameters():
            if init_b and name.endswith("lora_B"):
                parameter.normal_(std=init_b, generator=generator)
    return program


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
    linear = FitSpec(steps=100, learning_rate=1.0, warmup=0.1, schedule="linear")
    assert [linear.rate_at(s) for s in (9, 10, 55, 99)] == pytest.approx([1, 1, 0.5, 1 / 90])
    constant = FitSpec(steps=100, learning_rate=0.5, warmup=0.1, schedule="constant")
    assert [constant.rate_at(s) for s in (4, 10, 99)] == pytest.approx([0.25, 0.5, 0.5])


def test_the_schedule_of_other_loops_has_the_same_rates() -> None:
    spec = FitSpec(steps=12, learning_rate=1e-2, lora_plus_ratio=4.0, warmup=0.3)
    optimizer = make_optimizer(language_model(), spec)
    schedule = make_schedule(optimizer, spec)
    for step in range(12):
        a, b = schedule.get_last_lr()
        assert (a, b) == pytest.approx((spec.rate_at(step), 4 * spec.rate_at(step)))
        optimizer.step()
        schedule.step()


def test_b_learns_at_a_rate_of_its_own() -> None:
    """The first step of AdamW moves each number that has a gradient by its rate."""
    spec = FitSpec(steps=10, batch_size=6, learning_rate=1e-3, lora_plus_ratio=16.0, warmup=0.0)
    moved: dict[str, float] = {}
    program = language_model()
    with torch.no_grad():
        for name, parameter in program.named_adapter_parameters():
            if name.endswith("lora_B"):  # else A would get no gradient in the first step
                parameter.normal_(std=0.01)
    before = adapters(program)

    def look(report: StepReport, state: FitState) -> bool:
        for name, parameter in program.named_adapter_parameters():
            moved[name] = float((parameter.detach() - before[name]).abs().max())
        return True

    fit(program, EXAMPLES, spec, on_step=look)
    for name, distance in moved.items():
        rate = 16e-3 if name.endswith("lora_B") else 1e-3
        assert distance == pytest.approx(rate, rel=1e-2), name


@pytest.mark.parametrize("pooling", ["mean", "scaled_sum"])
def test_a_pooling_is_a_rate_of_a(pooling: str) -> None:
    """A starts in units of 1 / f, and AdamW's steps have no unit: f A learns at f times the rate.

    docs/design/training.md chooses among poolings by it.
    """
    factor = qc.AdapterSpec(pooling=pooling).pooling_factor(32, 2)
    spec = FitSpec(steps=6, batch_size=6, learning_rate=5e-3, clip=1e6)
    slower = dataclasses.replace(
        spec, learning_rate=5e-3 * factor, lora_plus_ratio=1 / factor
    )  # of A alone
    found = fit(language_model(pooling=pooling), EXAMPLES, spec).losses
    assert found == pytest.approx(fit(language_model(), EXAMPLES, slower).losses, abs=1e-4)
    assert found != pytest.approx(fit(language_model(), EXAMPLES, spec).losses, abs=1e-3)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_small_batches_add_up_to_a_large_one(accumulate: int) -> None:
    """Examples of other lengths: a mean of means would be another number."""
    rows = [tuple(range(10, 13 + 2 * n)) for n in range(8)]
    examples = [Example(row, row) for row in rows]
    results = []
    for parts in (1, accumulate):
        program = language_model()
        spec = FitSpec(steps=4, batch_size=8 // parts, accumulate=parts, learning_rate=1e-2, seed=1)
        results.append((fit(program, examples, spec).losses, adapters(program)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, parameter in results[0][1].items():
        # AdamW divides by the gradient's own size, which enlarges what was rounded.
        assert_close(results[1][1][name], parameter, relative=1e-3)


def test_a_step_of_unequal_parts_is_no_mean_of_means() -> None:
    """The check above can fail: the mean of means of its batches is another number."""
    short, long = (10, 11, 12), tuple(range(10, 40))
    program, spec = language_model(), FitSpec(steps=1, batch_size=2, seed=0)
    mean = fit(program, [Example(r, r) for r in (short, long)], spec).losses[0]
    program = language_model()
    each = [evaluate(program_forward(program), [Example(row, row)]).loss for row in (short, long)]
    weights = [2 / 31, 29 / 31]
    assert mean == pytest.approx(sum(w * e for w, e in zip(weights, each, strict=True)), abs=1e-5)
    assert abs(mean - sum(each) / 2) > 1e-3


def test_a_gradient_is_clipped_and_its_norm_told() -> None:
    program = language_model()
    spec = FitSpec(steps=1, batch_size=6, clip=1e-3)
    norms: list[float] = []

    def look(report: StepReport, state: FitState) -> bool:
        norms.append(report.grad_norm)
        gradients = [p.grad.flatten() for p in program.adapter_parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return False

    fit(program, EXAMPLES, spec, on_step=look)
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_training_stops_when_the_held_out_loss_does_and_keeps_the_best() -> None:
    """Learning to count up spoils counting down, after a while at the latest."""
    held_out = [Example(row[::-1], row[::-1]) for row in ROWS]
    spec = FitSpec(steps=60, batch_size=6, learning_rate=5e-2, evaluate_every=2, patience=3)
    program = language_model()
    seen: list[tuple[int, float]] = []

    def note(report: StepReport, state: FitState) -> bool:
        if report.held_out is not None:
            seen.append((report.step, report.held_out))
        return False

    result = fit(program, EXAMPLES, spec, held_out=held_out, on_step=note)
    best_step, best = min(seen, key=lambda pair: pair[1])
    assert not result.stopped
    assert [step for step, _ in seen] == list(range(2, result.step + 1, 2))
    assert (result.kept, result.step) == (best_step, best_step + 3 * 2)
    assert result.step < 60
    assert evaluate(program_forward(program), held_out).loss == pytest.approx(best, abs=1e-6)


def test_without_patience_the_last_adapters_are_kept() -> None:
    held_out = [Example(row[::-1], row[::-1]) for row in ROWS]
    spec = FitSpec(steps=5, batch_size=6, learning_rate=5e-2, evaluate_every=2)
    seen: list[float | None] = []

    def note(report: StepReport, state: FitState) -> bool:
        seen.append(report.held_out)
        return False

    program = language_model()
    result = fit(program, EXAMPLES, spec, held_out=held_out, on_step=note)
    assert [value is None for value in seen] == [True, False, True, False, False]
    assert (result.step, result.kept) == (5, 5)
    assert evaluate(program_forward(program), held_out).loss == pytest.approx(seen[-1], abs=1e-6)
    with pytest.raises(UserInputError, match="no held-out examples"):
        fit(program, EXAMPLES, spec)


def test_training_leaves_the_callers_random_numbers_alone() -> None:
    program = language_model()
    torch.manual_seed(11)
    fit(program, EXAMPLES, SPEC)
    drawn = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(3))


def test_dropout_is_drawn_from_the_seed() -> None:
    def losses(seed: int) -> tuple[float, ...]:
        torch.manual_seed(seed)  # of no consequence
        program = language_model(dropout=0.5, init_b=0.05)
        return fit(program, EXAMPLES, SPEC).losses

    assert losses(1) == losses(2)
    assert losses(1) != fit(language_model(init_b=0.05), EXAMPLES, SPEC).losses


def test_bfloat16_trains_like_float32_but_for_its_rounding() -> None:
    if not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16")
    spec = FitSpec(steps=10, batch_size=6, learning_rate=5e-3)
    exact = fit(language_model(), EXAMPLES, spec).losses
    program = language_model()
    rounded = fit(program, EXAMPLES, dataclasses.replace(spec, precision="bfloat16")).losses
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded[-1] < rounded[0] - 0.05
    assert {p.dtype for p in program.adapter_parameters()} == {torch.float32}


def test_bfloat16_is_refused_where_it_is_only_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    with pytest.raises(UnsupportedError, match="no instructions for bfloat16"):
        fit(language_model(), EXAMPLES, FitSpec(steps=1, precision="bfloat16"))


@pytest.mark.parametrize("where", ["forward", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_and_changes_nothing(where: str) -> None:
    program = language_model(init_b=0.05)
    kept: dict[str, torch.Tensor] = {}

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")

    def after(report: StepReport, state: FitState) -> bool:
        if report.step == 2:
            parameter = program.adapter_parameters()[0]
            if where == "gradient":
                parameter.register_hook(spoil)
            else:
                parameter.data.fill_(float("inf"))
            kept.update(adapters(program))
        return False

    with pytest.raises(UserInputError, match="at step 3"):
        fit(program, EXAMPLES, SPEC, on_step=after)
    assert all(torch.equal(kept[n], p) for n, p in adapters(program).items())


def test_weights_are_good_once_a_loss_was_computed_with_them() -> None:
    program, seen = language_model(), list[tuple[Any, ...]]()
    made: dict[int, dict[str, torch.Tensor]] = {}

    def step(report: StepReport, state: FitState) -> bool:
        seen.append(("made", report.step))
        made[report.step] = adapters(program)
        return False

    def good(state: FitState, last: bool) -> None:
        seen.append(("good", state.step, last))
        found = adapters(program)
        assert all(torch.equal(found[n], p) for n, p in made[state.step].items())

    fit(program, EXAMPLES, dataclasses.replace(SPEC, steps=2), on_step=step, on_good=good)
    assert seen == [("made", 1), ("good", 1, False), ("made", 2), ("good", 2, True)]


def diverge(report: StepReport, state: FitState) -> bool:
    """For `on_step`: from the fourth step on, a rate at which the weights overflow."""
    if report.step == 3:
        for group in state.optimizer.param_groups:
            group["initial_lr"] = 1e25
    return False


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "at step 5 the loss is nan"),
        ({"steps": 4}, "after step 4 the loss is nan"),
        ({"evaluate_every": 1}, "after step 4 the held-out loss is nan"),
        ({"evaluate_every": 1, "patience": 2}, "after step 4 the held-out loss is nan"),
    ],
    ids=str,
)
def test_weights_that_diverged_are_never_good(values: dict[str, Any], said: str) -> None:
    """The loss of step 4, which is finite, was computed with the weights of step 3."""
    program, good = language_model(), list[int]()
    spec = dataclasses.replace(SPEC, **values)
    state = FitState.fresh(program, spec)

    def note(state: FitState, last: bool) -> None:
        good.append(state.step)

    with pytest.raises(UserInputError, match=said):
        fit(program, EXAMPLES, spec, state=state, held_out=EXAMPLES, on_step=diverge, on_good=note)
    assert good == [1, 2, 3]
    assert state.step == 4
    if spec.patience:
        assert state.best is not None
        assert state.best.step <= 3


@pytest.mark.slow
def test_a_step_tells_how_many_held_out_answers_are_right() -> None:
    answers = [Example(row, (*[-100] * 8, row[-1])) for row in ROWS]
    spec = FitSpec(steps=40, batch_size=6, learning_rate=5e-2, evaluate_every=5)
    program, seen = language_model(), list[tuple[float | None, float]]()

    def note(report: StepReport, state: FitState) -> bool:
        if report.held_out is not None:
            now = evaluate(program_forward(program), answers).exact_match
            seen.append((report.held_out_accuracy, now))
        return False

    fit(program, answers, spec, held_out=answers, on_step=note)
    assert all(stated == now for stated, now in seen)
    assert max(now for _, now in seen) > 0.0


def test_examples_that_hold_nothing_to_learn_are_refused() -> None:
    with pytest.raises(UserInputError, match="step 1 hold nothing to learn"):
        fit(language_model(), [Example((1, 2, 3), (-100, -100, -100))], SPEC)


def test_programs_that_cannot_train_are_refused() -> None:
    program = language_model()
    with pytest.raises(PreconditionError, match="insert adapters"):
        fit(qc.fold_adapters(program), EXAMPLES, SPEC)
    with pytest.raises(UserInputError, match="no example"):
        fit(program, [], SPEC)


def test_a_model_without_logits_is_refused() -> None:
    program = qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    with pytest.raises(UnsupportedError, match="not a language model"):
        logits_of(program(torch.randn(2, 16)))


@pytest.mark.parametrize(
    "values",
    [
        {"steps": -1},
        {"steps": 2.0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"lora_plus_ratio": -1.0},
        {"weight_decay": -0.1},
        {"schedule": "stairs"},
        {"warmup": 1.5},
        {"clip": 0.0},
        {"precision": "float16"},
        {"patience": 2},
        {"evaluate_every": -1},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(UserInputError, match=name):
        FitSpec(**values)


def test_a_spec_goes_to_json_and_back() -> None:
    spec = FitSpec(steps=3, accumulate=2, lora_plus_ratio=4.0, evaluate_every=1, patience=2)
    assert FitSpec.from_json(spec.to_json()) == spec


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


def test_held_out_examples_are_read_as_they_are_needed() -> None:
    """With `--data-cache` all of them may not fit into memory."""
    done: list[str] = []

    class OnDisk(Sequence[Example]):
        def __len__(self) -> int:
            return len(EXAMPLES)

        @overload
        def __getitem__(self, index: int) -> Example: ...
        @overload
        def __getitem__(self, index: slice) -> Sequence[Example]: ...
        def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
            done.append("read")
            return EXAMPLES[index]

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        done.append("computed")
        return torch.zeros(*ids.shape, 64)

    evaluate(forward, OnDisk(), batch_size=2)
    assert done == ["read", "computed"] * 3


def test_a_program_is_evaluated_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_: qc.Program, *given: torch.Tensor) -> None:
        raise LookupError([tensor.device.type for tensor in given])

    monkeypatch.setitem(program_forward.__globals__, "model_inputs", look)
    program = language_model()
    program.module.to("meta")
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(LookupError, match="meta.*meta.*meta"):
        program_forward(program)(ids, ids, ids)


def test_what_cannot_be_evaluated_is_refused() -> None:
    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids.shape, 64), float("inf"))

    with pytest.raises(UserInputError, match="after step 7 the held-out loss is nan"):
        evaluate(forward, EXAMPLES).check("after step 7")
    for nothing in ([], [Example((1, 2), (-100, -100))]):
        with pytest.raises(UserInputError, match="nothing to predict"):
            evaluate(forward, nothing)

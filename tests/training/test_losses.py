"""DPO and ORPO: the losses and gradients of TRL on the same batch, and training by them."""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.config.choices import DPO, ORPO
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training import Example, FitSpec, FitState, StepReport, fit
from qalora_compile.training.data.batches import Batches, Packed
from qalora_compile.training.data.example import IGNORED, Batch, collate
from qalora_compile.training.distributed import Processes
from qalora_compile.training.fit import adapters_of
from qalora_compile.training.forward import chunked_loss
from qalora_compile.training.hf_trainer import trainer_arguments, trainer_rows
from qalora_compile.training.losses import (
    BatchLoss,
    _log_one_minus_exp,
    evaluate_pairs,
    held_out_metrics,
)
from qalora_compile.training.records.checkpoint import save_checkpoint
from qalora_compile.training.records.run_identity import Identity
from tests.models import assert_close, llama, randomize_adapters, token_ids
from tests.training.records.test_checkpoint import go_on
from tests.training.test_fit import EXAMPLES, adapters, language_model

LOSSES = (DPO, ORPO)


def answer(prompt: tuple[int, ...], *tokens: int) -> Example:
    return Example((*prompt, *tokens), (*[IGNORED] * len(prompt), *tokens))


def pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> Example:
    return dataclasses.replace(answer(prompt, *chosen), rejected=answer(prompt, *rejected))


PAIRS = [
    pair((start,), tuple(range(start + 1, start + 4 + start % 3)), (start + 3, start + 1))
    for start in range(10, 18)
]
"""Counting up is preferred. Prompts of one token: TRL's ORPO learns prompts, too."""


def spec_of(loss: str, **options: Any) -> FitSpec:
    given: dict[str, Any] = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "seed": 3}
    return FitSpec(loss=loss, **given | options)


def models() -> tuple[nn.Module, nn.Module, qc.Program]:
    """A model with adapters that the program shares, and one with those of the reference."""
    torch.manual_seed(1)
    model = llama().double()
    program = qc.adapt_module_(model, (token_ids(2, 8),), adapter=qc.AdapterSpec(rank=4))
    randomize_adapters(program, seed=1)
    torch.manual_seed(1)
    other = llama().double()
    fixed = qc.adapt_module_(other, (token_ids(2, 8),), adapter=qc.AdapterSpec(rank=4))
    randomize_adapters(fixed, seed=1)
    randomize_adapters(program, size=0.3, seed=2)
    return model, other, program


def outputs_for_trl(model: nn.Module) -> Any:
    """A call of a model with what TRL's own head gives, from full logits."""

    def call(*, labels: Tensor, fused_lm_head: bool, **given: Any) -> Any:
        rows = model(**given).logits[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]
        found = rows.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        rest = torch.zeros_like(found)
        return SimpleNamespace(
            log_probs=found * (targets != IGNORED),
            entropy=rest,
            mean_logits=rest,
            is_top1=rest.bool(),
        )

    return call


def trl_dpo(model: nn.Module, other: nn.Module, batch: Batch, beta: float) -> Tensor:
    """TRL's loss without a trainer around it."""
    from trl.trainer.dpo_trainer import DPOTrainer

    same = lambda x: x  # noqa: E731
    values = {
        "model": model,
        "ref_model": outputs_for_trl(other),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "accelerator": SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        **dict.fromkeys(("aux_loss_enabled", "precompute_ref_logps", "use_weighting"), False),
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": beta,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer: Any = object.__new__(DPOTrainer)
    vars(trainer).update(values)
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": (batch.labels != IGNORED).long(),
    }
    loss: Tensor = trainer._compute_loss(outputs_for_trl(model), given, False)
    return loss


def trl_orpo(model: nn.Module, batch: Batch, beta: float) -> Tensor:
    """TRL's loss without a trainer around it."""
    with warnings.catch_warnings():  # it says that it is experimental
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer

    trainer: Any = object.__new__(ORPOTrainer)
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.padding_value, trainer.beta = 0, beta
    given: dict[str, Tensor] = {}
    for name, rows in (("chosen", slice(batch.pairs)), ("rejected", slice(batch.pairs, None))):
        given[f"{name}_input_ids"] = batch.input_ids[rows]
        given[f"{name}_attention_mask"] = batch.attention_mask[rows]
        given[f"{name}_labels"] = batch.labels[rows]
    loss: Tensor = trainer.get_batch_loss_metrics(model, given)[0]
    return loss


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [300, 1 << 23])
def test_loss_and_gradient_are_those_of_trl(
    loss: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", chunk)  # 300: two rows of 128
    model, other, program = models()
    named = dict(program.named_adapter_parameters())
    reference = {name: dict(other.named_parameters())[name].detach() for name in named}
    batch = collate(PAIRS[:3])
    spec = spec_of(loss, beta=0.3)
    mine = sum(BatchLoss(program, spec, reference)(batch))
    theirs = trl_orpo(model, batch, 0.3) if loss == ORPO else trl_dpo(model, other, batch, 0.3)
    assert isinstance(mine, Tensor)
    # TRL computes log odds in float32
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-6 if loss == ORPO else 1e-10)
    parameters = list(named.values())
    for ours, expected in zip(
        torch.autograd.grad(mine, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_training_learns_to_prefer(loss: str) -> None:
    program = language_model()
    start = adapters_of(program)
    spec = spec_of(loss, steps=30, batch_size=4, learning_rate=2e-2)
    before = held_out_metrics(program, PAIRS, spec, start)
    result = fit(program, PAIRS, spec)
    after = held_out_metrics(program, PAIRS, spec, start)
    assert after.loss < before.loss - 0.1
    assert after.exact_match == 1.0
    assert result.losses[-1] < result.losses[0] - 0.05
    if loss == DPO:
        assert before.exact_match == 0.5, "every pair is a tie"
        assert before.loss == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_held_out_loss_is_that_of_training(loss: str) -> None:
    program, other = language_model(init_b=0.2), adapters_of(language_model(init_b=0.05))
    spec = spec_of(loss)
    with torch.no_grad():
        means = sum(BatchLoss(program, spec, other)(collate(PAIRS)))
    found = evaluate_pairs(program, PAIRS, spec, other)
    assert found.loss == pytest.approx(float(means), rel=1e-5)
    assert found.examples == len(PAIRS)


@pytest.mark.parametrize("loss", LOSSES)
def test_small_batches_add_up_to_a_large_one(loss: str) -> None:
    results = []
    for parts in (1, 4):
        program = language_model(init_b=0.05)
        spec = spec_of(loss, steps=3, batch_size=8 // parts, accumulate=parts)
        results.append((fit(program, PAIRS, spec).losses, adapters(program)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, parameter in results[0][1].items():
        assert_close(results[1][1][name], parameter, relative=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_resumed_training_ends_with_the_same_bits(loss: str, tmp_path: Path) -> None:
    """The reference of DPO is the model with which training began, not that of the checkpoint."""
    spec = spec_of(loss, evaluate_every=2)
    at_once, seen = language_model(dropout=0.2, init_b=0.05), list[Any]()

    def note(report: StepReport, state: FitState) -> bool:
        seen.append((report.loss, report.held_out, report.held_out_accuracy))
        return False

    fit(at_once, PAIRS, spec, held_out=PAIRS, on_step=note)
    expected, seen = seen, []
    first = language_model(dropout=0.2, init_b=0.05)

    def stop(report: StepReport, state: FitState) -> bool:
        note(report, state)
        if report.step == 3:
            save_checkpoint(tmp_path, first, state, Identity.of(first, spec))
        return report.step == 3

    fit(first, PAIRS, spec, held_out=PAIRS, on_step=stop)
    again = language_model(dropout=0.2, init_b=0.05)
    state = go_on(again, spec, tmp_path)
    fit(again, PAIRS, spec, held_out=PAIRS, on_step=note, state=state)
    assert seen == expected
    for name, parameter in adapters(at_once).items():
        assert torch.equal(adapters(again)[name], parameter), name
    assert (tmp_path / "step-00000003" / "reference.safetensors").exists() == (loss == DPO)


def test_two_processes_weigh_pairs_as_one() -> None:
    """The other process has as many pairs, and answers of other lengths."""

    class Half(Processes):
        count = 2

        def sum(self, value: float) -> float:
            return 2 * value

    spec = spec_of(DPO, steps=1, batch_size=2)
    program, alone = language_model(init_b=0.05), language_model(init_b=0.05)
    both = fit(program, PAIRS[:2], spec, processes=Half()).losses
    assert both == pytest.approx(fit(alone, PAIRS[:2], spec).losses, abs=1e-6)


def test_log_of_one_minus_exp() -> None:
    x = torch.tensor([-50.0, -2.0, -0.5, -1e-6, 0.0], dtype=torch.float64, requires_grad=True)
    found = _log_one_minus_exp(x)
    expected = torch.log1p(-torch.exp(x.detach()))
    torch.testing.assert_close(found[:4].detach(), expected[:4], rtol=1e-9, atol=0.0)
    found.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool(found.isfinite().all())


def test_data_and_loss_must_suit_each_other() -> None:
    program = language_model()
    with pytest.raises(UserInputError, match="the loss is dpo, and the examples are no pairs"):
        fit(program, EXAMPLES, spec_of(DPO))
    with pytest.raises(UserInputError, match="loss is cross-entropy, and the examples are pairs"):
        fit(program, PAIRS, FitSpec(steps=1))
    with pytest.raises(UserInputError, match="only the texts of a decoder-only"):
        Packed(PAIRS, 64)
    state = FitState.fresh(program, FitSpec(steps=1))
    with pytest.raises(UserInputError, match="no adapters of a reference model"):
        fit(program, PAIRS, spec_of(DPO), state=state)


def test_trainers_of_hugging_face_take_no_pairs() -> None:
    with pytest.raises(UnsupportedError, match="of cross-entropy, not of dpo"):
        trainer_arguments(spec_of(DPO))
    with pytest.raises(UnsupportedError, match="pairs of answers"):
        trainer_rows(PAIRS, spec_of(DPO))


def test_a_batch_of_pairs_has_the_preferred_answers_first() -> None:
    batch = Batches(PAIRS, batch_size=4, seed=0, by_length=True).at(0)
    assert batch.pairs == 4
    assert batch.input_ids.shape[0] == 8
    assert torch.equal(batch.input_ids[:4, 0], batch.input_ids[4:, 0])
    assert batch.targets[4:].tolist() == [2] * 4
    assert batch.to(torch.device("cpu")).pairs == 4
    assert PAIRS[0].length == max(len(each.tokens) for each in PAIRS[0].answers)
    with pytest.raises(UserInputError, match="the token 200"):
        pair((1,), (2,), (200,)).check_tokens(128, "example 1")

"""Batches: what each holds. Rows of several examples: that none of them sees another."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import example as always
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.api import packed_form
from qalora_compile.capture.packed import capture_packed
from qalora_compile.errors import (
    PreconditionError,
    UnsupportedError,
    UserInputError,
)
from qalora_compile.training import Batches, Example, FitSpec, Packed, evaluate, fit
from qalora_compile.training.data.batches import batch_at
from qalora_compile.training.data.example import IGNORED, collate
from qalora_compile.training.evaluate import label_loss, packed_inputs, program_forward
from qalora_compile.training.forward.check_packed import check_packed
from tests.models import VOCABULARY, gpt2, llama, randomize_adapters, slow, token_ids

MODELS = {"llama": llama, "gpt2": gpt2}

Forms = dict[str, tuple[qc.Program, qc.Program]]
SIZES = (5, 4, 6, 3)


def prepared(model: nn.Module) -> qc.Program:
    ids = token_ids(2, 8)
    captured = qc.capture_model(model, (), {"input_ids": ids, "attention_mask": ids * 0 + 1})
    program = qc.insert_adapters(qc.quantize_groups(captured), qc.AdapterSpec(rank=4))
    return randomize_adapters(program)


@pytest.fixture(scope="module")
def forms() -> Forms:
    """Each model as it is, and in its packed form."""
    made = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        program = prepared(model)
        made[name] = program, packed_form(program, model, max_length=32)
    return made


def examples(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCABULARY, (s,), generator=generator).tolist() for s in sizes]
    return [Example(tuple(row), tuple(row)) for row in rows]


def logits(program: qc.Program, rows: list[Example]) -> Tensor:
    batch = collate(rows)
    with program.evaluating():
        return program_forward(program)(batch.input_ids, batch.attention_mask)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_example_has_the_logits_and_loss_that_it_has_alone(
    name: str, forms: Forms
) -> None:
    program, packed = forms[name]
    alone = examples()
    (row,) = Packed(alone, 32)
    assert row.parts == (6, 5, 4, 3)
    together = logits(packed, [row])
    start = 0
    for example in sorted(alone, key=lambda e: -e.length):
        expected = logits(program, [example])
        found = together[:, start : start + example.length]
        assert float((found - expected).abs().max()) < 2e-6 * float(expected.abs().max())
        start += example.length
    rows, targets = label_loss(together, collate([row]))
    assert len(targets) == sum(SIZES) - len(SIZES)
    loss = nn.functional.cross_entropy(rows, targets)
    assert float(loss) == pytest.approx(evaluate(program_forward(program), alone).loss, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_never_sees_another_example(name: str, forms: Forms) -> None:
    """Bit for bit: what one example holds has no part in the logits of the others."""
    _, packed = forms[name]
    rows = list(Packed(examples((5, 4, 6, 3, 9, 2)), 18))
    batch = collate(rows)
    assert int(batch.attention_mask.max()) > 1 and int(batch.attention_mask.min()) == 0
    before = logits(packed, rows)
    for number in range(int(batch.attention_mask.max()) + 1):
        own = batch.attention_mask == number  # 0: what padding holds counts neither
        changed = torch.where(own, (batch.input_ids + 11) % VOCABULARY, batch.input_ids)
        with packed.evaluating():
            after = program_forward(packed)(changed, batch.attention_mask)
        assert torch.equal(after[~own], before[~own])
        assert not torch.equal(after[own], before[own])


def test_the_check_finds_examples_that_see_each_other(
    monkeypatch: pytest.MonkeyPatch, forms: Forms
) -> None:
    """Planted: a mask that is causal alone, then positions that count on."""
    evaluation = sys.modules["qalora_compile.training.evaluate"]  # the package has a function there
    right = packed_inputs

    def causal(owners: Tensor) -> dict[str, Tensor]:
        return right(owners) | {"attention_mask": right(owners * 0 + 1)["attention_mask"]}

    def counting_on(owners: Tensor) -> dict[str, Tensor]:
        return right(owners) | {"position_ids": right(owners * 0 + 1)["position_ids"]}

    monkeypatch.setattr(evaluation, "packed_inputs", causal)
    with pytest.raises(UnsupportedError, match="attends to another|packing changes the logits"):
        check_packed(*forms["llama"])
    # GPT-2's positions are absolute; in Llama only distances count, and those are right
    monkeypatch.setattr(evaluation, "packed_inputs", counting_on)
    with pytest.raises(UnsupportedError, match="packing changes the logits"):
        check_packed(*forms["gpt2"])
    check_packed(*forms["llama"])


def test_both_forms_train_the_same_adapters(forms: Forms) -> None:
    program, packed = forms["llama"]
    shared = dict(program.named_adapter_parameters())
    assert all(p is shared[n] for n, p in packed.named_adapter_parameters())
    rows = Packed(examples((5, 4, 6, 3) * 4), 24)
    spec = FitSpec(steps=25, batch_size=3, learning_rate=2e-2, seed=1)
    held_out = examples()
    before = evaluate(program_forward(program), held_out).loss
    result = fit(packed, Batches(rows, batch_size=3, seed=1), spec)
    assert result.losses[-1] < result.losses[0]
    assert evaluate(program_forward(program), held_out).loss != before


def test_packed_rows_are_refused_by_a_program_that_would_mix_them(forms: Forms) -> None:
    program, _ = forms["llama"]
    (row,) = Packed(examples(), 32)
    with pytest.raises(PreconditionError, match="would mix"):
        logits(program, [row])
    plain = logits(program, examples()[:1])
    assert plain.shape == (1, 5, VOCABULARY)


def test_models_that_cannot_keep_examples_apart_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(UnsupportedError, match="no position_ids"):
        capture_packed(bloom, max_length=8)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    config.use_cache = False
    mistral = MistralForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="sliding_window"):
        capture_packed(mistral, max_length=17)
    assert len(capture_packed(mistral, max_length=16).signature.inputs) == 3
    assert not mistral.training


@given(st.lists(st.integers(2, 12), min_size=1, max_size=40), st.integers(12, 30))
def test_every_example_is_in_exactly_one_row(sizes: list[int], limit: int) -> None:
    alone = [Example((i,) * size, (i,) * size) for i, size in enumerate(sizes)]
    packed = Packed(alone, limit)
    assert sorted(i for row in packed.rows for i in row) == list(range(len(sizes)))
    for row, length in zip(packed, packed.lengths.tolist(), strict=True):
        assert sum(row.parts) == len(row.tokens) == len(row.labels) == length <= limit
    # best fit: no two rows could have been one
    free = sorted(limit - length for length in packed.lengths.tolist())
    assert len(free) < 2 or limit - free[-1] > free[-2] or limit - free[-2] > free[-1]
    assert 0 < packed.fill <= 1


def test_the_first_token_of_a_packed_example_carries_no_loss() -> None:
    (row,) = Packed([Example((1, 2, 3), (1, 2, 3)), Example((4, 5), (IGNORED, 5))], 8)
    assert row.tokens == (1, 2, 3, 4, 5)
    assert row.labels == (IGNORED, 2, 3, IGNORED, 5)
    assert collate([row]).attention_mask.tolist() == [[1, 1, 1, 2, 2]]
    assert collate([row]).tokens == 5


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UserInputError, match="3 tokens, and a row has 2"):
        Packed([Example((1, 2, 3), (1, 2, 3))], 2)
    with pytest.raises(UserInputError, match="decoder-only"):
        Packed([Example((1, 2), (1, 2), source=(3,))], 8)
    with pytest.raises(UserInputError, match="decoder-only"):
        Packed([Example((1, 2), (), label=1)], 8)
    with pytest.raises(UserInputError, match="no examples to pack"):
        Packed([], 8)


def of_lengths(*lengths: int) -> list[Example]:
    return [Example((i,) * n, (i,) * n) for i, n in enumerate(lengths)]


def test_by_length_pads_less_and_takes_every_example_once() -> None:
    generator = torch.Generator().manual_seed(0)
    examples = of_lengths(*torch.randint(2, 60, (90,), generator=generator).tolist())
    wasted = {}
    for by_length in (False, True):
        batches = Batches(examples, batch_size=8, seed=1, by_length=by_length)
        assert len(batches) == 11
        epoch = [batches.at(step) for step in range(11)]
        seen = [int(i) for batch in epoch for i in batch.input_ids[:, 0]]
        assert len(set(seen)) == len(seen) == 88
        wasted[by_length] = sum(int((b.attention_mask == 0).sum()) for b in epoch)
        widths = [b.input_ids.shape[1] for b in epoch]
        assert widths not in (sorted(widths), sorted(widths, reverse=True))
        again = Batches(examples, batch_size=8, seed=1, by_length=by_length)
        for step in (17, 3, 25):  # in any order, and whatever was asked for before
            assert torch.equal(again.at(step).input_ids, batches.at(step).input_ids)
    assert wasted[True] < 0.25 * wasted[False]


@pytest.mark.parametrize("by_length", [False, *slow(True)])
@always(90, 8)
@given(st.integers(1, 40), st.integers(1, 9))
def test_over_epochs_every_example_has_its_turn(
    by_length: bool, count: int, batch_size: int
) -> None:
    """Less than half of them are left out of an epoch: 50 times the same one is no chance."""
    examples = of_lengths(*range(2, count + 2))
    batches = Batches(examples, batch_size=batch_size, seed=3, by_length=by_length)
    drawn: set[int] = set()
    for epoch in range(50):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        seen = [int(i) for step in steps for i in batches.at(step).input_ids[:, 0]]
        assert len(set(seen)) == len(seen) > len(examples) / 2
        drawn.update(seen)
    assert drawn == set(range(len(examples)))


@pytest.mark.parametrize("by_length", [False, True])
def test_what_is_left_out_depends_on_the_seed(by_length: bool) -> None:
    def left_out(seed: int) -> list[set[int]]:
        examples = of_lengths(*range(2, 92))
        batches = Batches(examples, batch_size=8, seed=seed, by_length=by_length)
        epochs = [range(start, start + 11) for start in (0, 11, 22)]
        taken = [[batches.at(step).input_ids[:, 0] for step in epoch] for epoch in epochs]
        return [set(range(90)) - set(torch.cat(rows).tolist()) for rows in taken]

    assert all(len(out) == 2 for out in left_out(1))
    assert left_out(1) == left_out(1) != left_out(2)
    assert left_out(1)[0] != left_out(1)[1]


def test_a_seed_can_be_any_integer() -> None:
    examples = of_lengths(*range(2, 30))
    seeds = (20241231235959, 20241231235960, 2**64 - 1, 10**30)
    found = [Batches(examples, batch_size=14, seed=seed).at(3).input_ids for seed in seeds]
    assert len({str(rows[:, 0].tolist()) for rows in found}) == 4


def test_batches_that_are_made_are_taken_as_they_are() -> None:
    examples = of_lengths(*range(2, 14))
    batches = Batches(examples, batch_size=4, seed=1, by_length=True)
    found = batch_at(batches, 5, batch_size=4, seed=1)
    assert torch.equal(found.input_ids, batches.at(5).input_ids)
    with pytest.raises(UserInputError, match="size 4 and seed 1, not 4 and 2"):
        batch_at(batches, 5, batch_size=4, seed=2)
    with pytest.raises(UserInputError, match="no example"):
        Batches([], batch_size=4, seed=1)


def test_an_epoch_takes_every_example_once() -> None:
    examples = [Example((i, i), (i, i)) for i in range(12)]
    epoch = [batch_at(examples, step, batch_size=4, seed=1).input_ids[:, 0] for step in range(3)]
    assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    later = batch_at(examples, 3, batch_size=4, seed=1).input_ids[:, 0]
    assert later.tolist() != epoch[0].tolist()


def test_the_batch_of_a_step_depends_on_nothing_else() -> None:
    examples = [Example((i, i), (i, i)) for i in range(12)]
    first, again, other = (
        batch_at(examples, 7, batch_size=4, seed=seed).input_ids for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

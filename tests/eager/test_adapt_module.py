"""`adapt_module_` as users of the eager model meet it, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.eager.layers import AdaptedLinear
from qalora_compile.errors import UnsupportedError, UserInputError, VerificationError
from tests.models import (
    MLP,
    OneLinear,
    TiedHead,
    UsedTwice,
    assert_close,
    bert,
    gpt2,
    llama,
    randomize_adapters,
    slow,
    token_ids,
)

QUANT = qc.QuantSpec(bits=4, group_size=32)
ADAPTER = qc.AdapterSpec(rank=4)


def adapt(model: nn.Module, *args: Any, **options: Any) -> qc.Program:
    return qc.adapt_module_(model, args, quant=QUANT, adapter=ADAPTER, **options)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: nn.Module, state: dict[str, Tensor]) -> None:
    """The modules, their types, their tensors and their flags are those of before."""
    assert str(model) == str(before)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    flags = [(n, p.requires_grad) for n, p in before.named_parameters()]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags


def test_generate_follows_the_adapters_and_the_folded_program() -> None:
    torch.manual_seed(0)
    model: Any = llama()
    ids = token_ids(2, 8)
    program = adapt(model, token_ids(2, 16))
    base = model.generate(ids, max_new_tokens=12, do_sample=False)
    randomize_adapters(program, size=1.0)
    tuned = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert not torch.equal(base, tuned)
    folded = qc.fold_adapters(program)
    tokens = ids
    for _ in range(12):
        tokens = torch.cat([tokens, folded(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, tuned)


def test_labels_give_the_loss_of_the_program() -> None:
    model = gpt2()
    program = randomize_adapters(adapt(model, token_ids(2, 16)))
    ids = token_ids(2, 16)
    loss = model(ids, labels=ids).loss
    logits = program(ids).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss.detach()) - float(expected.detach())) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    torch.manual_seed(0)
    model: Any = llama()
    randomize_adapters(adapt(model, token_ids(2, 16)))
    ids = token_ids(2, 16)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()  # the embedding is frozen
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == sum(p.requires_grad for p in model.parameters())
    assert_close(found[1], found[0], relative=1e-6)


@pytest.mark.slow
def test_the_hugging_face_trainer_trains_what_is_folded(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = llama()
    program = adapt(model, token_ids(2, 16))
    frozen = {n: t.clone() for n, t in program.tensors().items() if not t.requires_grad}
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(16, 12) % 4]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        gradient_checkpointing=True,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    for name, tensor in frozen.items():
        assert torch.equal(tensor, program.tensors()[name]), f"{name} changed"
    ids = token_ids(3, 20)
    model.eval()
    folded = qc.fold_adapters(program.eval())
    with torch.no_grad():
        assert_close([folded(ids).logits], [model(ids).logits], relative=1e-4)
    assert (tmp_path / "run" / "checkpoint-8" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_checkpoint_of_the_model_loads_into_the_program() -> None:
    torch.manual_seed(0)
    model = bert()
    randomize_adapters(adapt(model, token_ids(2, 16)), seed=3)
    other = bert()
    program = adapt(other, token_ids(2, 16))
    program.module.load_state_dict(model.state_dict(), strict=False)
    ids = token_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        assert_close([program(ids).last_hidden_state], [expected], relative=1e-5)
        assert_close([other(ids).last_hidden_state], [expected], relative=1e-5)


def test_moving_the_model_moves_the_programs_parameters() -> None:
    model = MLP(64, 64, 8)
    program = adapt(model, torch.randn(4, 64))
    model.double()
    assert {p.dtype for p in program.module.parameters()} == {torch.float64}
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in program.module.parameters())


def test_linear_layers_are_replaced_and_say_what_they_are() -> None:
    model = MLP(64, 96, 8)
    model.layers[0].bias.requires_grad_(False)
    program = adapt(model, torch.randn(4, 64), exclude=["layers.1"])
    first, second = model.layers
    assert isinstance(first, AdaptedLinear) and type(second) is nn.Linear
    assert "bits=4, group_size=32, rank=4" in str(model)
    assert (first.in_features, first.out_features) == (64, 96)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "layers.0.lora_A",
        "layers.0.lora_B",
    ]
    x = torch.randn(5, 64)
    randomize_adapters(program)
    assert_close(
        [functional.linear(x, first.weight, cast("Tensor", first.bias))], [first(x)], relative=1e-5
    )


def test_a_forced_tied_head_leaves_the_embedding_float() -> None:
    torch.manual_seed(0)
    model = TiedHead()
    table = model.embed.weight.clone()
    ids = torch.randint(0, 48, (2, 8))
    program = randomize_adapters(adapt(model, ids, targets=["lm_head", "mid"]))
    assert torch.equal(model.embed.weight, table)
    assert isinstance(model.lm_head, AdaptedLinear)
    with torch.no_grad():
        assert_close([model(ids)], [program(ids)], relative=1e-6)
    assert set(program.tensors()) <= set(model.state_dict())


def test_a_shared_layer_is_adapted_once() -> None:
    model = UsedTwice()
    adapt(model, torch.randn(3, 32))
    assert sum(isinstance(m, AdaptedLinear) for m in model.modules()) == 2
    assert len([p for p in model.parameters() if p.requires_grad]) == 4


def test_a_layer_with_hooks_keeps_them() -> None:
    torch.manual_seed(0)
    model = OneLinear(64, 16)
    seen: list[tuple[int, ...]] = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    x = torch.randn(4, 64)
    program = randomize_adapters(adapt(model, x))
    seen.clear()
    assert_close([model(x)], [program(x)], relative=1e-5)
    assert seen == [(4, 16)]
    assert set(program.tensors()) == set(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)])
def test_half_precision_models(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = llama().to(dtype)
    program = randomize_adapters(adapt(model, token_ids(2, 16)))
    ids = token_ids(2, 9)
    with torch.no_grad():
        found = model(ids).logits
        assert found.dtype == dtype
        assert_close([found.float()], [program(ids).logits.float()], relative=2e-2)


class Bypass(nn.Module):
    """Computes with its weight differently in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)
        self.copy = [self.fc.weight.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        """A cached weight, where no gradient is wanted: the fast path of case 9, on purpose."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.fc(x)
        return functional.linear(x, self.copy[0], self.fc.bias)


def test_a_path_around_the_adapters_is_found_and_the_model_restored() -> None:
    model = Bypass()
    model.fc.bias.requires_grad_(False)
    before, state = copy.deepcopy(model), state_of(model)
    with pytest.raises(VerificationError, match="do not compute what the adapted program") as info:
        adapt(model, torch.randn(4, 64))
    assert "no_grad" in str(info.value)
    assert info.value.report is not None and info.value.report.verdict != "EQUAL"
    assert_untouched(model, before, state)


class TakenName(nn.Module):
    """A module with an attribute where a quantized tensor would go."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.weight = nn.Parameter(torch.randn(32, 64))
        self.inner: Any = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(32, 32))
        object.__setattr__(self.inner, "offset", 3)

    def forward(self, x: Tensor) -> Tensor:
        """Two products."""
        return functional.linear(self.first(x), self.weight) @ self.inner.weight + self.inner.offset


def test_a_taken_attribute_is_refused_and_the_model_restored() -> None:
    model = TakenName()
    before, state = copy.deepcopy(model), state_of(model)
    with pytest.raises(UnsupportedError, match="an attribute offset of its own") as info:
        adapt(model, torch.randn(4, 64))
    assert "inner" in str(info.value) and "exclude" in str(info.value)
    assert_untouched(model, before, state)
    x = torch.randn(4, 64)
    program = randomize_adapters(adapt(model, x, exclude=["inner"]))
    assert_close([model(x)], [program(x)], relative=1e-5)


class BothWays(nn.Module):
    """Multiplies by a weight and also returns its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64))
        self.more = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and the penalty of the weight."""
        return self.more(functional.linear(x, self.weight)), self.weight.square().sum()


def test_a_weight_that_is_also_read_in_float_is_refused() -> None:
    model = BothWays()
    before, state = copy.deepcopy(model), state_of(model)
    x = torch.randn(4, 64)
    with pytest.raises(UnsupportedError, match="read in float by"):
        adapt(model, x, targets=["re:.*"])
    assert_untouched(model, before, state)


def test_errors_of_capture_and_options_leave_the_model_alone() -> None:
    model = MLP(64, 64, 8)
    before, state = copy.deepcopy(model), state_of(model)
    with pytest.raises(UserInputError, match="matches no linear layer"):
        adapt(model, torch.randn(4, 64), targets=["no_such_layer"])
    with pytest.raises(UserInputError, match="does not run on the example"):
        adapt(model, torch.randn(4, 63))
    assert_untouched(model, before, state)

"""NEFTune: the noise of transformers on the same embeddings, in training only."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.config import QuantSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.spec import GROUP_EMBEDDING
from qalora_compile.training import Example, FitSpec, fit
from qalora_compile.training.data.example import Batch
from qalora_compile.training.forward.embedding_noise import EmbeddingNoise
from qalora_compile.training.forward.training_forward import TrainingForward
from qalora_compile.training.hf_trainer import trainer_arguments
from tests.models import bert, gpt2, llama, randomize_adapters, token_ids
from tests.training.records.test_checkpoint import go_on, stop_at
from tests.training.test_fit import EXAMPLES, SPEC, adapters, language_model

IDS = token_ids(3, 12)
BATCH = Batch(IDS, torch.ones_like(IDS), IDS)
ALPHA = 20.0
NOISY = dataclasses.replace(SPEC, neftune_alpha=ALPHA)


def test_noise_is_uniform_within_the_bound_of_the_paper() -> None:
    x = torch.zeros(4, 25, 64)
    noise = EmbeddingNoise(5.0)(x)
    bound = 5.0 / math.sqrt(25 * 64)
    assert float(noise.abs().max()) <= bound
    assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(noise.mean())) < 0.02 * bound
    assert EmbeddingNoise(5.0).eval()(x) is x


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_that_of_the_hook_of_transformers(checkpointing: bool) -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    torch.manual_seed(1)
    model: Any = llama().eval()
    program = qc.adapt_module_(model, (IDS,), adapter=qc.AdapterSpec(rank=4))
    randomize_adapters(program)
    forward = TrainingForward(program, gradient_checkpointing=checkpointing, neftune_alpha=ALPHA)
    plain = TrainingForward(program).loss(BATCH)
    program.train()
    torch.manual_seed(5)
    loss = forward.loss(BATCH)
    mine = torch.autograd.grad(loss, program.adapter_parameters())
    table = model.get_input_embeddings()
    table.neftune_noise_alpha = ALPHA
    table.train()
    handle = table.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(5)
    theirs = model(input_ids=IDS, labels=IDS).loss
    handle.remove()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(loss.item() - plain.item()) > 1e-4
    for ours, other in zip(
        mine, torch.autograd.grad(theirs, program.adapter_parameters()), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-5)


def noises(program: qc.Program) -> list[str]:
    """The tables whose rows get noise."""
    forward = TrainingForward(program, neftune_alpha=ALPHA)
    graph = forward._fused.graph
    return [n.all_input_nodes[0].name for n in graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("make", [bert, gpt2])
def test_tokens_get_noise_and_positions_none(make: Any) -> None:
    program = qc.quantize_groups(qc.capture_model(make(), (IDS,)), QuantSpec(group_size=16))
    assert noises(qc.insert_adapters(program, qc.AdapterSpec(rank=2))) == ["embedding"]


@pytest.mark.slow
def test_tables_on_codes_get_noise_too() -> None:
    program = qc.capture_model(llama(tie_word_embeddings=False).eval(), (IDS,))
    program = qc.quantize_groups(
        program, QuantSpec(group_size=16), embeddings=QuantSpec(bits=8, group_size=32)
    )
    assert any(node.target is GROUP_EMBEDDING for node in program.graph.nodes)
    assert len(noises(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))) == 1


def test_no_noise_leaves_every_bit_as_it_was() -> None:
    plain, silent, noisy = (
        fit(language_model(init_b=0.05), EXAMPLES, spec).losses
        for spec in (SPEC, dataclasses.replace(SPEC, neftune_alpha=0.0), NOISY)
    )
    assert plain == silent
    assert noisy != plain
    assert noisy == fit(language_model(init_b=0.05), EXAMPLES, NOISY).losses


def test_evaluation_has_no_noise() -> None:
    forward = TrainingForward(language_model(init_b=0.05), neftune_alpha=ALPHA)
    assert forward.loss(BATCH).item() == forward.loss(BATCH).item()
    forward.program.train()
    assert forward.loss(BATCH).item() != forward.loss(BATCH).item()


def test_a_resumed_training_draws_the_same_noise(tmp_path: Path) -> None:
    at_once = language_model(init_b=0.05)
    fit(at_once, EXAMPLES, NOISY)
    stop_at(3, language_model(init_b=0.05), NOISY, tmp_path)
    again = language_model(init_b=0.05)
    fit(again, EXAMPLES, NOISY, state=go_on(again, NOISY, tmp_path))
    for name, parameter in adapters(at_once).items():
        assert torch.equal(adapters(again)[name], parameter), name


class OneHot(nn.Module):
    """A model that multiplies tokens as one-hot vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, T, 32]`."""
        logits: Tensor = self.head(self.inner(functional.one_hot(input_ids, 32).float()))
        return logits


def test_a_model_that_looks_nothing_up_is_refused() -> None:
    program = qc.capture_model(OneHot().eval(), (IDS % 32,))
    program = qc.insert_adapters(qc.quantize_groups(program), qc.AdapterSpec(rank=1))
    with pytest.raises(UnsupportedError, match="no lookup of its input tokens"):
        fit(program, [Example((1, 2, 3), (1, 2, 3))], FitSpec(steps=1, neftune_alpha=5.0))


def test_a_trainer_gets_the_noise_as_an_argument() -> None:
    assert trainer_arguments(NOISY)["neftune_noise_alpha"] == ALPHA
    assert trainer_arguments(SPEC)["neftune_noise_alpha"] is None

"""What was trained on one capture is deployed in another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.skeleton import skeleton_of
from qalora_compile.errors import PreconditionError
from qalora_compile.ir.lazy_tensor import is_lazy
from qalora_compile.passes.recipes.replay import replay, replay_part
from tests.models import TiedHead, UsedTwice, adapted, gpt2, llama, token_ids


def trained() -> tuple[torch.nn.Module, qc.Program]:
    model, ids = llama(), token_ids(2, 16)
    return model, adapted(model, (ids, torch.ones_like(ids)))


def run(program: qc.Program, ids: torch.Tensor) -> torch.Tensor:
    keys = [leaf for leaf in program.signature.inputs if leaf.name.endswith(".key")]
    empty = [
        {n: torch.zeros(len(ids), int(k.shape[1]), 0, int(k.shape[3])) for n in ("key", "value")}
        for k in keys
    ]
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    with torch.no_grad():
        found: torch.Tensor = program(ids, torch.ones_like(ids), positions, empty)["logits"]
    return found


@pytest.mark.parametrize("fold", [False, True])
def test_the_other_graph_computes_what_was_trained(fold: bool) -> None:
    model, program = trained()
    program = qc.fold_adapters(program) if fold else program
    program.eval()
    cached = replay(program, capture_causal_lm(skeleton_of(model)))
    assert cached.stage == program.stage
    assert cached.history == program.history
    assert not any(map(is_lazy, cached.tensors().values()))
    ids = token_ids(3, 11)
    with torch.no_grad():
        expected = program(ids, torch.ones_like(ids)).logits
    torch.testing.assert_close(run(cached, ids), expected, rtol=1e-5, atol=1e-6)


def test_the_very_tensors_are_taken() -> None:
    model, program = trained()
    cached = replay(program, capture_causal_lm(skeleton_of(model)))
    given = program.tensors()
    assert all(tensor is given[name] for name, tensor in cached.tensors().items())


def test_a_float_program_needs_no_pass() -> None:
    model, ids = llama(), token_ids(2, 16)
    program = qc.capture_model(model, (ids, torch.ones_like(ids)))
    cached = replay(program, capture_causal_lm(skeleton_of(model)))
    assert not any(map(is_lazy, cached.tensors().values()))


def test_another_model_is_refused() -> None:
    _, program = trained()
    with pytest.raises(PreconditionError, match="no tensor transformer"):
        replay(program, capture_causal_lm(skeleton_of(gpt2())))


@pytest.mark.slow
def test_another_size_is_refused() -> None:
    from transformers import LlamaForCausalLM

    model, program = trained()
    config: Any = copy.copy(model.config)
    config.intermediate_size = 128
    with pytest.raises(PreconditionError, match="in this capture of its model"):
        replay(program, capture_causal_lm(skeleton_of(LlamaForCausalLM(config).eval())))


def test_a_part_decides_nothing_again() -> None:
    program = qc.capture_model(TiedHead(), (token_ids(2, 5) % 48,))
    source = qc.quantize_groups(program, targets=["lm_head"])
    part = replay_part(source, program)
    assert part.history == source.history
    assert [(r.decision, r.reason) for r in part.plan] == [
        (r.decision, r.reason) for r in source.plan
    ]
    assert all(tensor is source.tensors()[name] for name, tensor in part.tensors().items())


def test_a_weight_with_two_decisions_is_no_part() -> None:
    program = qc.capture_model(UsedTwice(), (torch.randn(2, 32),))
    source = qc.quantize_groups(program, exclude=["shared@2"])
    with pytest.raises(PreconditionError, match="for one use and kept for another"):
        replay_part(source, program)

"""How positions of padded texts are counted: as the model that is compared with does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.verify.runners.kv_cache import counts_padding
from qalora_compile.verify.runners.open_runner import ProgramRunner
from tests.models import slow
from tests.zoo.architectures import build

KINDS = {
    "GPT2LMHeadModel": True,
    "OPTForCausalLM": False,
    "LlamaForCausalLM": False,  # positions are relative: both counts are correct
    "BloomForCausalLM": False,
}


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", *slow(*list(KINDS)[1:])])
def test_padding_is_counted_as_the_model_does(name: str) -> None:
    ids = torch.arange(3, 15).reshape(2, 6)
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = qc.capture_model(build(name), (), call | {"use_cache": False})
    assert counts_padding(program, ProgramRunner(program)) is KINDS[name]


def test_a_program_without_logits_is_taken_as_it_is() -> None:
    ids = torch.arange(3, 15).reshape(2, 6)
    model: Any = build("LlamaForCausalLM").model
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    program = qc.capture_model(model, (), call)
    assert counts_padding(program, ProgramRunner(program))

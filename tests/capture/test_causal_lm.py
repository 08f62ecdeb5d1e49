"""Causal language models captured with their key-value cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.skeleton import skeleton_of
from qalora_compile.errors import CaptureError, UnsupportedError
from qalora_compile.ir.lazy_tensor import is_lazy
from tests.models import VOCABULARY, bert, gpt2, llama, token_ids

pytestmark = pytest.mark.usefixtures("traced_anew")


class Odd(LlamaForCausalLM):  # type: ignore[misc]  # transformers gives no types
    """A model that looks at values, which no capture can."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Fail under torch.export alone."""
        output = super().forward(*args, **kwargs)
        if kwargs["input_ids"].shape[1] > 1 and bool(output.logits.sum() > 0):
            output.logits = -output.logits
        return output


def empty_past(program: qc.Program, batch: int) -> list[dict[str, Tensor]]:
    """Keys and values of no token."""
    keys = [leaf for leaf in program.signature.inputs if leaf.name.endswith(".key")]
    return [
        {n: torch.zeros(batch, int(k.shape[1]), 0, int(k.shape[3])) for n in ("key", "value")}
        for k in keys
    ]


def step(program: qc.Program, ids: Tensor, mask: Tensor, past: list[dict[str, Tensor]]) -> Any:
    """One call, positions counted from the mask."""
    positions = (mask.cumsum(-1) - 1).clip(0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return program(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past
        )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return llama()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> qc.Program:
    return capture_causal_lm(model)


@pytest.mark.slow
def test_inputs_and_outputs_have_the_names_that_runtimes_know(program: qc.Program) -> None:
    shapes = {leaf.name: leaf.shape for leaf in program.signature.inputs}
    assert shapes["input_ids"] == shapes["position_ids"] == ("batch", "sequence")
    assert shapes["attention_mask"] == ("batch", "total_sequence")
    assert shapes["past_key_values.1.value"] == ("batch", 2, "past_sequence", 16)
    assert len(shapes) == 3 + 2 * 2
    wanted = ("logits", *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value")))
    assert program.signature.outputs == wanted
    assert program.signature.ranges == ()


def test_grouped_heads_are_not_repeated_and_transformers_is_as_it_was(
    program: qc.Program,
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attentions = [n for n in program.graph.nodes if "dot_product" in str(n.target)]
    assert [n.kwargs["enable_gqa"] for n in attentions] == [True, True]
    assert [n.args[1].meta["val"].shape[1] for n in attentions] == [2, 2]
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(CaptureError):
        capture_causal_lm(Odd(llama().config))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = mine = functools.partial(before)
        capture_causal_lm(llama())
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize(("batch", "past", "length"), [(1, 0, 1), (1, 7, 1), (3, 0, 4), (2, 20, 3)])
def test_steps_give_what_the_complete_sequence_gives(
    model: nn.Module, program: qc.Program, batch: int, past: int, length: int
) -> None:
    ids = token_ids(batch, past + length)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, past:]
    cache = empty_past(program, batch)
    if past:
        cache = step(program, ids[:, :past], torch.ones(batch, past).long(), cache)["present"]
    found = step(program, ids[:, past:], torch.ones(batch, past + length).long(), cache)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-6)
    assert found["present"][0]["key"].shape[2] == past + length


def test_padding_on_the_left_changes_nothing(program: qc.Program) -> None:
    ids = token_ids(1, 6)
    plain = step(program, ids, torch.ones(1, 6).long(), empty_past(program, 1))["logits"]
    padded = torch.cat([torch.zeros(1, 3).long(), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    found = step(program, padded, mask, empty_past(program, 1))["logits"][:, 3:]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_last_logits_alone(model: nn.Module, program: qc.Program) -> None:
    last = capture_causal_lm(model, last_logits=True)
    ids, mask = token_ids(2, 5), torch.ones(2, 5).long()
    every = step(program, ids, mask, empty_past(program, 2))["logits"]
    found = step(last, ids, mask, empty_past(last, 2))["logits"]
    assert found.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(found[:, 0], every[:, -1], rtol=1e-5, atol=1e-6)


def test_tensors_keep_the_names_of_a_capture_without_cache(
    model: nn.Module, program: qc.Program
) -> None:
    ids = token_ids(2, 16)
    plain = qc.capture_model(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert set(program.tensors()) == set(plain.tensors())


def test_no_weight_is_read() -> None:
    captured = capture_causal_lm(skeleton_of(gpt2()))
    weights = {n: t for n, t in captured.tensors().items() if n.endswith("weight")}
    assert weights
    assert all(map(is_lazy, weights.values()))


@pytest.mark.slow
def test_a_window_of_attention_is_kept_in_the_mask() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
    )
    windowed = Gemma3ForCausalLM(config).eval()
    captured = capture_causal_lm(windowed)
    ids = token_ids(1, 12)
    cache = step(captured, ids[:, :9], torch.ones(1, 9).long(), empty_past(captured, 1))["present"]
    found = step(captured, ids[:, 9:], torch.ones(1, 12).long(), cache)["logits"]
    with torch.no_grad():
        expected = windowed(input_ids=ids, use_cache=False).logits[:, 9:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedError, match="no key-value cache") as error:
        capture_causal_lm(MambaForCausalLM(config).eval())
    assert "--no-kv-cache" in str(error.value.hint)


def test_an_encoder_is_refused() -> None:
    with pytest.raises((UnsupportedError, CaptureError)):
        capture_causal_lm(bert())

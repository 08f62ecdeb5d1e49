"""Frequencies that follow the length of a text are those of transformers, at every length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.model import capture_model
from qalora_compile.cli.main import main
from tests.models import llama, slow

TRAINED = 32
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED},
}


def model_of(kind: str, *, scale: float = 4) -> Any:
    torch.manual_seed(0)
    model = llama(
        num_key_value_heads=4,
        max_position_embeddings=TRAINED,
        tie_word_embeddings=False,
        rope_parameters=KINDS[kind] | {"rope_theta": 10000.0},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)  # so that positions count
    return model


def text(length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", ["yarn", *slow("dynamic", "longrope")])
def test_logits_are_those_of_transformers_at_every_length(kind: str) -> None:
    """A model of transformers keeps the frequencies of the longest text: each is a new one."""
    cached = capture_causal_lm(model_of(kind)).module
    plain = capture_model(model_of(kind), (), text(9) | {"use_cache": False}).module
    for length in (20, TRAINED, TRAINED + 1, 3 * TRAINED, 20):
        inputs = text(length)
        with torch.no_grad():
            expected = model_of(kind)(**inputs, use_cache=False).logits
            past = [{part: torch.zeros(2, 4, 0, 16) for part in ("key", "value")} for _ in "ab"]
            positions = torch.arange(length).repeat(2, 1)
            found = cached(**inputs, position_ids=positions, past_key_values=past)["logits"]
            complete = plain(**inputs, use_cache=False)["logits"]
        assert torch.allclose(found, expected, atol=1e-5), length
        assert torch.allclose(complete, expected, atol=1e-5), length


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_length_counts(kind: str) -> None:
    """Otherwise the test above would pass with frequencies that never change."""
    short = model_of("yarn" if kind == "dynamic" else "dynamic")
    with torch.no_grad():
        inputs = text(3 * TRAINED)
        here, there = (m(**inputs, use_cache=False).logits for m in (model_of(kind), short))
    assert float((here - there).abs().max()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_exported_models_follow_the_length(kind: str, tmp_path: Path) -> None:
    from tests.cli.tiny import write_model

    write_model(tmp_path / "m")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).unlink()
    model_of(kind, scale=1).save_pretrained(tmp_path / "m")
    out = str(tmp_path / "edge")
    assert main(["quantize", str(tmp_path / "m"), "--out", out, "--bits", "8"]) == 0
    assert main(["verify", str(tmp_path / "m"), out, "--max-rel", "0.05"]) == 0

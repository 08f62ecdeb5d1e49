"""The command line end to end, for architectures that differ in kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import complete, slow
from tests.zoo.road import STEPS, walk

KINDS = (
    ("BloomForCausalLM", 1),  # no position ids
    ("DeepseekV2ForCausalLM", 2),  # experts one by one, complex rotary embeddings
    ("Lfm2ForCausalLM", 2),  # a state of convolutions
    ("OPTForCausalLM", 1),  # positions that count no padding
    ("DogeForCausalLM", 1),  # a mask that is made of values
    ("NllbMoeForConditionalGeneration", 1),
    ("RobertaForSequenceClassification", 1),
)
"""A class, and how many layers it needs for all kinds of layers that it has."""


@pytest.mark.parametrize(
    ("name", "layers"), slow(*KINDS) + complete(("MptForCausalLM", 2))
)  # no position ids either
def test_end_to_end(name: str, layers: int, tmp_path: Path) -> None:
    results = list(walk(name, tmp_path, layers))
    assert [(r.step, r.code) for r in results if r.code] == [], results[-1].said
    assert [result.step for result in results] == list(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Dinov2ForImageClassification", "HubertForSequenceClassification"]
)
def test_images_and_audio_from_fine_tuning_on(name: str, tmp_path: Path) -> None:
    results = list(walk(name, tmp_path, layers=1))
    assert [(r.step, r.code) for r in results if r.code] == [], results[-1].said
    assert [result.step for result in results] == list(STEPS[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MambaForCausalLM", "only takes texts of 16 tokens"),
        ("YoutuForCausalLM", "computes model.embed_tokens.weight in place"),
    ],
)
def test_what_is_refused_says_why(name: str, reason: str, tmp_path: Path) -> None:
    refused = [result for result in walk(name, tmp_path, layers=1) if result.code]
    assert refused and all(result.code == 2 for result in refused)
    assert any(reason in " ".join(result.said.split()) for result in refused)

"""The command line end to end, for architectures that differ in kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.zoo.road import STEPS, walk

KINDS = (
    "BloomForCausalLM",  # no position ids
    "MptForCausalLM",
    "DeepseekV2ForCausalLM",  # experts one by one, complex rotary embeddings
    "Lfm2ForCausalLM",  # a state of convolutions
    "OPTForCausalLM",  # positions that count no padding
    "DogeForCausalLM",  # a mask that is made of values
    "NllbMoeForConditionalGeneration",
    "RobertaForSequenceClassification",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_end_to_end(name: str, tmp_path: Path) -> None:
    results = list(walk(name, tmp_path))
    assert [(r.step, r.code) for r in results if r.code] == [], results[-1].said
    assert [result.step for result in results] == list(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Dinov2ForImageClassification", "HubertForSequenceClassification"]
)
def test_images_and_audio_from_fine_tuning_on(name: str, tmp_path: Path) -> None:
    results = list(walk(name, tmp_path))
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
    refused = [result for result in walk(name, tmp_path) if result.code]
    assert refused and all(result.code == 2 for result in refused)
    assert any(reason in " ".join(result.said.split()) for result in refused)

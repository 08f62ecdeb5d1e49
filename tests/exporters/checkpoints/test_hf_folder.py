"""Configurations have the names that readers from before transformers 5 ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from qalora_compile.exporters.checkpoints.hf_folder import with_former_names

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("config", "former"),
    [
        (
            transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
            {"rope_theta": 1e5},
        ),
        (
            transformers.LlamaConfig(rope_parameters=LLAMA3),
            {
                "rope_theta": 5e5,
                "rope_scaling": {n: v for n, v in LLAMA3.items() if n != "rope_theta"},
            },
        ),
        (transformers.PhiConfig(), {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
    ids=["default", "llama3", "partial"],
)
def test_rotary_embeddings_have_their_former_names_and_are_read_alike(
    config: Any, former: dict[str, Any], tmp_path: Path
) -> None:
    written = with_former_names(json.loads(config.to_json_string(use_diff=False)))
    assert {name: written[name] for name in former} == former
    (tmp_path / "config.json").write_text(json.dumps(written), "utf-8")
    again: Any = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert"},
        {"rope_parameters": None},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},  # by kind of layer
    ],
)
def test_others_stay_as_they_are(config: dict[str, Any]) -> None:
    assert with_former_names(config) == config


def test_what_is_there_stays() -> None:
    config = {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0, "rope_type": "default"}}
    assert with_former_names(config) == config

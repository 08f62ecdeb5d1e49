"""Hostile adapters of PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora_compile.capture.peft_adapters import read_peft_adapter
from tests.attacks.support import attack, refused
from tests.fuzz.seeds import FORMATS

EXPLODING = "(a+)+$|(.*.*.*.*.*)*x|((((a*)*)*)*)*b"


@pytest.fixture
def adapter(folder: Path) -> Path:
    FORMATS["PEFT"].build(folder)
    return folder


def read(folder: Path) -> Callable[[], Any]:
    return lambda: sorted(read_peft_adapter(folder).updates)


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer targets than layers": ({"target_modules": ["v_proj"]}, "none of the target_modules"),
    "layers that are left out": ({"exclude_modules": ["q_proj"]}, "one of the exclude_modules"),
    "an expression of such": ({"exclude_modules": ".*q_proj"}, "one of the exclude_modules"),
    "other layers": ({"layers_to_transform": [7]}, "none of the layers_to_transform"),
    "layers of another pattern": (
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        "none of the layers_to_transform",
    ),
    "a layer that is saved": ({"modules_to_save": ["q_proj"]}, "one of the modules_to_save"),
    "a part of a path": ({"target_modules": "q_proj"}, "none of the target_modules"),
    "what PEFT refuses": ({"layers_pattern": "layers"}, "PEFT refuses the settings"),
    "layers that are texts": ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
    "modules that are a text": ({"modules_to_save": "head"}, "modules_to_save is"),
    "targets that are numbers": ({"target_modules": [1, 2]}, "target_modules"),
    "targets that are an object": ({"target_modules": {"a": 1}}, "target_modules"),
    "a setting that nobody knows": ({"use_magnitude_gate": True}, "use_magnitude_gate"),
    "patterns that are a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "patterns that are a number": ({"alpha_pattern": 3}, "alpha_pattern"),
    "a pattern that looks around": ({"rank_pattern": {"(?!x)q_proj": 2}}, ""),
    "one that also explodes": ({"rank_pattern": {"(?!x)(a+)+q_proj": 2}}, "cannot be matched"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, "cannot be matched"),
    "a rank of 0": ({"r": 0}, "rank"),
    "a rank of 2**62": ({"r": 2**62}, "rank"),
    "a rank that is a text": ({"r": "2"}, "rank"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "finite"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, "finite"),
    "alpha of 10**50": ({"lora_alpha": 10**50, "alpha_pattern": {}}, "lora_alpha"),
    "alpha is true": ({"lora_alpha": True, "alpha_pattern": {}}, "lora_alpha"),
    "a switch that is a text": ({"use_rslora": "no"}, "use_rslora"),
    "groups of 0": ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size"),
    "groups of 2**62": ({"use_qalora": True, "qalora_group_size": 2**62}, "qalora_group_size"),
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "a kind that is an object": ({"peft_type": {"a": 1}}, "kind"),
    "code of one's own": (
        {"auto_mapping": {"base_model_class": "canary", "parent_library": "canary"}},
        "",
    ),
    "a base elsewhere": ({"base_model_name_or_path": "../../secret.txt"}, ""),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_are_refused_by_name(kind: str, adapter: Path) -> None:
    """Values that PEFT would take, ignore or fail on."""
    changes, words = SETTINGS[kind]
    change(adapter, **changes)
    if words:
        refused(read(adapter), adapter, words)
    else:
        assert attack(read(adapter), adapter).kind == "value"


@pytest.mark.parametrize(
    "name",
    [
        *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
        *("layers_pattern", "modules_to_save"),
    ],
)
def test_an_expression_that_explodes_ends_at_once(name: str, adapter: Path) -> None:
    """PEFT matches patterns with Python's engine, which some expressions keep busy for years."""
    kinds: dict[str, Any] = {"rank_pattern": {EXPLODING: 2}, "alpha_pattern": {EXPLODING: 2}}
    pattern = kinds.get(name, [EXPLODING] if name == "modules_to_save" else EXPLODING)
    more = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    change(adapter, **{name: pattern}, **more)
    attack(read(adapter), adapter)


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "a NaN": ({A: torch.full((2, 32), torch.nan)}, "NaN"),
    "an infinity": ({B: torch.full((32, 2), torch.inf)}, "infinity"),
    "rank 0": ({A: torch.empty(0, 32), B: torch.empty(32, 0)}, "adapter is empty"),
    "integers": ({A: torch.ones(2, 32, dtype=torch.int64)}, "int64"),
    "three axes": ({A: torch.ones(2, 4, 8)}, "lora_A"),
    "one axis": ({B: torch.ones(64)}, "lora_B"),
    "ranks that differ": ({A: torch.ones(3, 32)}, "ranks differ"),
    "no B": ({B: None}, "lora_B is missing"),
    "a name that leads elsewhere": ({"../../secret.lora_A.weight": torch.ones(2, 2)}, ""),
    "an embedding": ({A.replace("lora_A.weight", "lora_embedding_A"): torch.ones(2, 2)}, "lora_"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_adapter_are_refused(kind: str, adapter: Path) -> None:
    """Values, shapes and names that would spoil the model or fail inside a library."""
    changes, words = TENSORS[kind]
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(read(adapter), adapter, words)


def test_a_valid_adapter_is_read(adapter: Path) -> None:
    assert len(attack(read(adapter), adapter).value) == 2

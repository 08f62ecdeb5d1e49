"""Models without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.capture.skeleton import build_skeleton, skeleton_of
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.lazy_tensor import is_lazy
from tests.models import llama


def described(folder: Path, **changes: object) -> Path:
    """A folder with a configuration."""
    model: Any = llama()
    value = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(value), "utf-8")
    return folder


def test_parameters_are_fake_and_buffers_real(tmp_path: Path) -> None:
    skeleton = build_skeleton(described(tmp_path / "model"))
    original = llama()
    shapes = {n: p.shape for n, p in original.named_parameters()}
    assert {n: p.shape for n, p in skeleton.named_parameters()} == shapes
    assert all(is_lazy(p) for p in skeleton.parameters())
    for name, buffer in original.named_buffers():
        assert torch.equal(buffer, dict(skeleton.named_buffers())[name])
    assert not skeleton.training


def test_ties_stay_ties(tmp_path: Path) -> None:
    skeleton: Any = build_skeleton(described(tmp_path / "model", tie_word_embeddings=True))
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    apart: Any = build_skeleton(described(tmp_path / "other", tie_word_embeddings=False))
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


def test_a_large_model_takes_no_memory(tmp_path: Path) -> None:
    folder = described(
        tmp_path / "model", hidden_size=8192, intermediate_size=32768, num_hidden_layers=40
    )
    skeleton = build_skeleton(folder)
    assert sum(p.numel() for p in skeleton.parameters()) > 10**10


def test_a_copy_leaves_the_model_as_it_is() -> None:
    model = llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    copy = skeleton_of(model)
    assert all(is_lazy(p) for p in copy.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = described(tmp_path / "model", architectures=["MyOwnModel"])
    with pytest.raises(UnsupportedError, match="MyOwnModel"):
        build_skeleton(folder)


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    folder = described(tmp_path / "model", num_attention_heads=0)
    with pytest.raises(UserInputError, match="does not describe"):
        build_skeleton(folder)
    (folder / "config.json").write_text("{", "utf-8")
    with pytest.raises(UserInputError, match="not valid JSON"):
        build_skeleton(folder)
    with pytest.raises(UserInputError, match="missing"):
        build_skeleton(tmp_path)

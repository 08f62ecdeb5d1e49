"""Adapters in PEFT's files: PEFT reads them, and computes what the program does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.config import POOLINGS
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.training.records.peft_adapters import (
    CONFIG_FILE,
    TENSORS_FILE,
    load_peft,
    save_peft,
)
from tests.models import llama, token_ids
from tests.training.test_fit import adapters, language_model

peft = pytest.importorskip("peft")
IGNORED = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'qalora_pooling'.")
"""How PEFT says that it does not know our field."""


def saved(folder: Path, pooling: str = "sum", **adapter: Any) -> qc.Program:
    program = language_model(init_b=0.1, pooling=pooling, **adapter)
    save_peft(program, folder, pooling=pooling, base_model="tiny")
    return program


@IGNORED
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_the_config(tmp_path: Path, rslora: bool) -> None:
    saved(tmp_path / "a", "mean_times_groups", alpha=12.0, use_rslora=rslora)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    assert isinstance(config, peft.LoraConfig)
    assert (config.use_qalora, config.qalora_group_size, config.r) == (True, 32, 4)
    assert config.lora_alpha == pytest.approx(24.0 if rslora else 12.0)
    assert config.alpha_pattern == {}
    assert "model.layers.0.self_attn.q_proj" in config.target_modules
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["qalora_pooling"] == (
        "mean_times_groups"
    )


@IGNORED
def test_tensors_have_the_names_that_peft_gives(tmp_path: Path) -> None:
    program = saved(tmp_path / "a")
    stored = load_tensors(tmp_path / "a" / TENSORS_FILE)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    plain = peft.LoraConfig(r=4, target_modules=config.target_modules)
    model = peft.get_peft_model(llama(), plain)
    theirs = peft.get_peft_model_state_dict(model)
    assert theirs.keys() == stored.keys()
    for name, tensor in stored.items():
        if "lora_B" in name:  # their A is not pooled without a GPTQ model
            assert tensor.shape == theirs[name].shape
    own = {n: p.detach() for n, p in program.named_adapter_parameters()}
    assert len(own) == len(stored)


@IGNORED
@pytest.mark.parametrize("pooling", POOLINGS)
def test_peft_computes_what_the_program_does(tmp_path: Path, pooling: str) -> None:
    """PEFT's own forward of a pooled layer, with what it reads of the files."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    program = saved(tmp_path / "a", pooling, alpha=6.0)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    stored = load_tensors(tmp_path / "a" / TENSORS_FILE)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rank = config.rank_pattern.get(path, config.r)
        alpha = config.alpha_pattern.get(path, config.lora_alpha)
        lora_a, lora_b = (
            stored[f"base_model.model.{path}.{part}.weight"] for part in ("lora_A", "lora_B")
        )
        width = program.plan[path].k
        layer: Any = SimpleNamespace(
            lora_A={"default": SimpleNamespace(weight=lora_a)},
            lora_B={"default": SimpleNamespace(weight=lora_b)},
            lora_dropout={"default": torch.nn.Identity()},
            scaling={"default": alpha / rank},
            qalora_group_size={"default": config.qalora_group_size},
            training=False,
            in_features=width,
        )
        x = torch.randn(2, 3, width)
        theirs = QALoraLinearVariant.forward(layer, "default", x, torch.zeros(1))
        spec = qc.AdapterSpec(rank=4, alpha=6.0, pooling=pooling)
        factor = spec.scaling * spec.pooling_factor(32, width // 32)
        ours = x.unflatten(-1, (-1, 32)).sum(-1) @ lora_a.t() @ lora_b.t() * factor
        assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_adapters_come_back(tmp_path: Path) -> None:
    program = saved(tmp_path / "a", use_rslora=True)
    again = language_model(use_rslora=True)
    load_peft(again, tmp_path / "a")
    expected = adapters(program)
    assert all(torch.equal(expected[n], p) for n, p in adapters(again).items())


def test_other_adapters_are_refused_and_the_difference_named(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for adapter, what in (
        ({"rank": 2}, "rank of model.layers.0.self_attn.q_proj is 4 in the files and 2"),
        ({"alpha": 8.0}, "alpha, as PEFT counts it, of model.layers.0.self_attn.q_proj"),
        ({"group_size": 64}, "group size of .* is 32 in the files and 64"),
        ({"pooling": "mean"}, "alpha"),
    ):
        program = language_model(init_b=0.3, **adapter)
        before = adapters(program)
        with pytest.raises(UserInputError, match=what):
            load_peft(program, tmp_path / "a")
        assert all(torch.equal(before[n], p) for n, p in adapters(program).items())
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config | {"use_qalora": False}))
    with pytest.raises(UserInputError, match="not pooled"):
        load_peft(language_model(), tmp_path / "a")


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    program = language_model()
    with pytest.raises(PreconditionError, match="has no adapters"):
        save_peft(qc.fold_adapters(program), tmp_path / "a", pooling="sum")
    with pytest.raises(UserInputError, match="pooling"):
        save_peft(program, tmp_path / "a", pooling="max")
    captured = qc.capture_model(llama().eval(), (token_ids(2, 8),))
    kept = qc.insert_adapters(
        qc.quantize_groups(captured, exclude=("lm_head",)),
        qc.AdapterSpec(rank=2),
        train=("lm_head",),
    )
    with pytest.raises(UnsupportedError, match="train together with"):
        save_peft(kept, tmp_path / "a", pooling="sum")
    integer = qc.quantize_groups(captured, qc.QuantSpec(zero_point="integer"))
    integer = qc.insert_adapters(integer, qc.AdapterSpec(rank=2, kind="scale"))
    with pytest.raises(UnsupportedError, match="keep zero-points integer"):
        save_peft(integer, tmp_path / "a", pooling="sum")
    assert not (tmp_path / "a").exists()

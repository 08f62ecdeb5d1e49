"""The extension keeps the contracts, and works in pipelines, specifications and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qalora_example.nibbles import read_nibbles
from qalora_example.remove_unit_scale import RemoveUnitScale
from safetensors.torch import save_file
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile import extend
from qalora_compile.capture.load_source import load_source
from qalora_compile.testing import check_pass, check_quantizer, check_reader, check_target

GROUP = 16


class Scaled(nn.Module):
    """A linear layer between scales, two of which are one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x * 1.0)
        return y / 1.0 * 2.0


def captured() -> qc.Program:
    torch.manual_seed(0)
    return qc.capture_model(Scaled().eval(), (torch.randn(3, 20),))


def test_the_pass_keeps_its_contract() -> None:
    program = captured()
    check_pass(RemoveUnitScale(), program, idempotent=True, captured=program)
    check_pass(RemoveUnitScale(divisions=False), program, idempotent=True, captured=program)


def test_the_pass_is_a_line_of_text() -> None:
    result = qc.Pipeline.parse("remove-unit-scale{divisions=false}")(captured())
    assert len(result.changes) == 1
    assert result.program.history == ("remove-unit-scale{divisions=false}",)
    assert len(qc.Pipeline.parse("remove-unit-scale")(captured()).changes) == 2


@pytest.mark.parametrize("name", ["two-sigma", "three-sigma"])
def test_the_quantizers_keep_their_contract(name: str) -> None:
    check_quantizer(name, bits=(2, 4))


def test_the_quantizer_is_a_value_of_the_specification() -> None:
    spec = qc.QuantSpec(method="two-sigma", group_size=8)
    program = qc.quantize_groups(captured(), spec)
    assert program.plan["fc"].bits == 4
    assert "method=two-sigma" in program.history[-1]


def test_the_target_keeps_its_contract() -> None:
    check_target("npz")


def test_numpy_computes_what_the_program_computes(tmp_path: Path) -> None:
    program = qc.quantize_groups(captured(), qc.QuantSpec(group_size=8))
    report = qc.export_model(program, tmp_path / "npz", qc.ExportSpec(target="npz"))
    assert report.quantized_layers == 1
    weights = np.load(tmp_path / "npz" / "weights.npz")
    scale, offset = (np.repeat(weights[f"fc.{part}"], 8, 1)[:, :20] for part in ("scale", "offset"))
    x = torch.randn(5, 20)
    y = x.numpy() @ (weights["fc.codes"] * scale + offset).T + weights["fc.bias"]
    np.testing.assert_allclose(2 * y, program(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def written(folder: Path) -> dict[str, extend.GroupAffine]:
    """A small llama in the format; gives its weights on codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    tensors, weights = {}, {}
    for name, tensor in LlamaForCausalLM(config).state_dict().items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor.clone()
            continue
        n, k = tensor.shape
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scale = torch.rand(n, k // GROUP) + 0.1
        affine = extend.GroupAffine(codes, scale, -8 * scale, 4, GROUP)
        tensors[f"{module}.nibbles"] = codes[:, ::2] | codes[:, 1::2] << 4
        tensors[f"{module}.scale"], tensors[f"{module}.low"] = scale, affine.offset
        weights[module] = affine
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    said: dict[str, Any] = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    said["quantization_config"] = {"quant_method": "nibbles", "group_size": GROUP}
    (folder / "config.json").write_text(json.dumps(said), "utf-8")
    return weights


def test_the_reader_keeps_its_contract(tmp_path: Path) -> None:
    check_reader("nibbles", tmp_path / "model", written(tmp_path / "model"))


def test_a_checkpoint_is_opened_by_its_folder(tmp_path: Path) -> None:
    weights = written(tmp_path / "model")
    source = load_source(str(tmp_path / "model"))
    assert len(source.stored()[0]) == len(weights) == 7
    name, affine = next(iter(weights.items()))
    assert torch.equal(source.model.get_parameter(f"{name}.weight"), affine.dequantize())
    assert callable(read_nibbles)

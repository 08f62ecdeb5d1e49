"""Every ONNX target, with each fusion and preset, is proved: a Llama with its cache, no samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.config import ONNX_TARGETS, PRESETS
from qalora_compile.verdict import PROVEN
from tests.models import adapted, llama, slow, token_ids

SPECS = {
    **{
        f"{target}, fusion {fusion}": qc.ExportSpec(target=target, fusion=fusion)
        for target in ONNX_TARGETS
        for fusion in ("none", "standard")
    },
    **{
        f"{target}, preset {preset}": qc.ExportSpec.from_preset(preset, target=target)
        for target in ("ort", "ort-stock")
        for preset in PRESETS
    },
    "ort in float": qc.ExportSpec(expansion="float"),
    "ort in halves": qc.ExportSpec(parameter_dtype="float16"),
    "ort in two digits": qc.ExportSpec(accuracy_level=2),
    "ort for an old release": qc.ExportSpec(runtime="onnxruntime==1.18"),
    "ort-stock in digits": qc.ExportSpec(target="ort-stock", correction="digits"),
    "onnx, opset 23": qc.ExportSpec(target="onnx", opset=23),
}

QUICK = (
    "ort, fusion standard",
    "ort-stock, fusion none",
    "onnx, fusion standard",
    "ort, preset fast",
)
"""Those of the default suite: one a target, and one in which values are rounded."""


@pytest.fixture(scope="module")
def program() -> qc.Program:
    """The program with a cache."""
    torch.manual_seed(0)
    model = llama()
    return qc.add_kv_cache(qc.fold_adapters(adapted(model, (token_ids(2, 16),))), model)


@pytest.mark.parametrize("name", [*QUICK, *slow(*(n for n in SPECS if n not in QUICK))])
def test_proved(name: str, program: qc.Program, tmp_path: Path) -> None:
    qc.export_model(program, tmp_path / "model.onnx", SPECS[name])
    found = qc.prove_equivalence(program, tmp_path / "model.onnx", samples=0)
    left = [(s.name, s.problem or s.lines) for s in found.segments if s.status != "proved"]
    assert found.verdict in PROVEN, left[:3]
    assert len(found.segments) >= len(found.sites) > 0

"""NaN and infinities are never written out, and never proved or verified to be equal."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program_record import admit_file
from qalora_compile.ir.safetensors_io import load_tensors, save_tensors
from qalora_compile.sealed import digest_of_file
from qalora_compile.verify import Tolerance, prove_equivalence, verify_equivalence
from qalora_compile.verify.inputs import sample_inputs
from qalora_compile.verify.numeric.compare_nodes import compare_nodes
from tests.models import capture_transformer, llama, slow

NAMES = (
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
)
TABLE = "lm_head.weight"
"""What a program calls the table of tokens that a head is tied to."""
OFFSET = "model.layers.1.mlp.up_proj.offset"
VALUES = (math.nan, math.inf, -math.inf)
TARGETS = ("ort", "ort-stock", "onnx", "float", "safetensors", "mlx", "hqq", "gguf")


@functools.cache
def folded() -> qc.Program:
    return qc.quantize_groups(capture_transformer(llama()), qc.QuantSpec(group_size=32))


def spoiled(program: qc.Program, name: str, value: float, at: int | None = None) -> qc.Program:
    """The program with one value changed, in the middle of a tensor or somewhere else."""
    tensors = program.tensors()
    changed = tensors[name].detach().clone()
    changed.view(-1)[changed.numel() // 2 if at is None else at] = value
    same = nn.Parameter(changed, requires_grad=False)
    tensors[name] = same if isinstance(tensors[name], nn.Parameter) else changed
    return program.evolve(graph=program.copy_graph(), tensors=tensors)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [NAMES[0], "model.layers.0.mlp.up_proj.scale"])
def test_no_target_writes_nan(tmp_path: Path, target: str, name: str) -> None:
    program = spoiled(folded(), name, math.nan)
    suffix = {"gguf": ".gguf"}.get(target, "" if target not in TARGETS[:3] else ".onnx")
    with pytest.raises(UserInputError, match=f"the tensor {name} holds NaN or infinite") as caught:
        qc.export_model(program, tmp_path / f"out{suffix}", qc.ExportSpec(target=target))
    assert caught.value.where == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"), [*((name, math.nan) for name in NAMES), *((NAMES[0], v) for v in VALUES[1:])]
)
def test_quantize_refuses_a_checkpoint_with_nan(
    tmp_path: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = llama()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_tensors(path)
    tensors[name].view(-1)[-1] = value
    save_tensors(tensors, path)
    assert main(["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "edge")]) == 2
    assert name in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("target", "name"),
    [*slow(("ort", TABLE)), ("float", TABLE), ("ort", OFFSET), ("safetensors", OFFSET)],
)
def test_export_refuses_a_folder_with_nan(
    tmp_path: Path, target: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "folded"
    folded().save(source)
    (source / "run.json").write_text(json.dumps({"format": "qalora-run", "version": 1}), "utf-8")
    tensors = load_tensors(source / "quantized.safetensors")
    tensors[name].view(-1)[3] = math.nan
    path = source / "quantized.safetensors"
    save_tensors(tensors, path)
    admit_file(source, path.name, [digest_of_file(path)])  # as if it had been written so
    words = ["export", str(source), "--out", str(tmp_path / "out"), "--target", target]
    assert main(words) == 2
    assert name in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folded"]


class Masked(nn.Module):
    """A model with a mask of −∞ as a buffer."""

    mask: Tensor

    def __init__(self, value: float = -math.inf) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        mask = torch.zeros(64, 64)
        mask[torch.triu(torch.ones(64, 64), 1) > 0] = value
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of 64 positions to themselves, none to later ones."""
        y = self.fc(x)
        return torch.softmax(y @ y.transpose(-1, -2) + self.mask, -1) @ y


def masked(value: float) -> qc.Program:
    return qc.quantize_groups(qc.capture_model(Masked(value), (torch.randn(2, 64, 64),)))


def test_a_mask_of_infinities_is_no_damage(tmp_path: Path) -> None:
    program = masked(-math.inf)
    qc.export_model(program, tmp_path / "m.onnx")
    calls = sample_inputs(program, 1)
    tolerance = Tolerance(max_rel=1e-4)
    assert verify_equivalence(program, tmp_path / "m.onnx", calls, tolerance).passed
    assert prove_equivalence(program, tmp_path / "m.onnx").passed
    with pytest.raises(UserInputError, match="the tensor mask holds NaN"):
        qc.export_model(masked(math.inf), tmp_path / "n.onnx")
    with pytest.raises(UserInputError, match="the tensor mask holds NaN"):
        qc.export_model(masked(math.nan), tmp_path / "n.onnx")


class Lookup(nn.Module):
    """A table, and a layer on what is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)
        self.fc = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        """A row for each number."""
        return self.fc(self.table(ids))


@pytest.mark.parametrize("value", VALUES)
def test_a_file_with_nan_is_equal_to_nothing(tmp_path: Path, value: float) -> None:
    """In a row that no input reads: the outputs agree, and yet it is no model."""
    ids = torch.arange(20).reshape(2, 10)
    program = qc.quantize_groups(qc.capture_model(Lookup(), (ids,)))
    path, name, tolerance = tmp_path / "m.onnx", "table.weight", Tolerance(max_rel=1e-4)
    qc.export_model(program, path)
    levels = ("basic",)
    calls = {"low numbers": {"ids": ids}}
    assert prove_equivalence(program, path).passed
    assert verify_equivalence(program, path, [(ids,)], tolerance).passed
    assert compare_nodes(program, path, calls, levels=levels).passed
    model = onnx.load(path)
    proto = next(t for t in model.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(proto).copy()
    values[63, 5] = value
    proto.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, path)
    says = f"the tensor {name} holds NaN or infinite values"
    certificate = prove_equivalence(spoiled(program, name, value, at=63 * 64 + 5), path)
    assert certificate.verdict == "DIFFERENT"
    assert says in str(certificate.difference)
    report = verify_equivalence(program, path, [(ids,)], tolerance)
    assert not report.passed
    assert says in str(report.first_divergence)
    numeric = compare_nodes(program, path, calls, levels=levels)
    assert numeric.verdict == "DIFFERENT"
    assert any(says in way.problem for way in numeric.modes)


def test_fold_refuses_what_training_has_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = qc.insert_adapters(folded(), qc.AdapterSpec(rank=2))
    for name in ("model.layers.0.mlp.up_proj.lora_B", "model.norm.weight"):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        spoiled(program, name, math.inf).save(run)
        (run / "run.json").write_text(json.dumps({"format": "qalora-run", "version": 1}), "utf-8")
        assert main(["fold", str(run), "--out", str(tmp_path / "folded")]) == 2
        assert name in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]

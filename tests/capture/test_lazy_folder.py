"""Checkpoints whose weights stay in their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import qalora_compile as qc
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.onnx import initializers
from qalora_compile.ir.lazy_tensor import is_lazy, materialize
from tests.models import llama, token_ids


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return llama()


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """A checkpoint in three shards with an index, its head tied to its embedding."""
    path = tmp_path / "model"
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_weights_are_those_of_the_files(model: Any, folder: Path) -> None:
    program = capture_checkpoint(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = program.tensors()
    deferred = {n: t for n, t in tensors.items() if is_lazy(t)}
    assert set(deferred) == set(parameters) & set(tensors)
    for name, tensor in deferred.items():
        assert torch.equal(materialize(tensor), parameters[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantizing_later_is_quantizing_now(model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    twin = type(model)(model.config).eval().to(dtype)
    twin.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    twin = type(model).from_pretrained(tmp_path / "model", dtype=dtype).eval()
    ids = token_ids(2, 8)
    now = qc.quantize_groups(qc.capture_model(twin, (ids, torch.ones_like(ids))))
    later = qc.quantize_groups(capture_checkpoint(tmp_path / "model"))
    qc.export_model(qc.add_kv_cache(now, twin), tmp_path / "now.onnx")
    qc.export_model(later, tmp_path / "later.onnx")
    first, second = (
        {t.name: t for t in onnx.load(tmp_path / name).graph.initializer}
        for name in ("now.onnx", "later.onnx")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        pair = [onnx.numpy_helper.to_array(t) for t in (tensor, second[name])]
        assert np.array_equal(*pair), name


@pytest.mark.slow
def test_the_command_writes_a_folder_that_generates(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "edge"
    assert main(["quantize", str(folder), "--out", str(out), "--bits", "3"]) == 0
    record = json.loads((out / "qalora.json").read_text("utf-8"))
    assert record["layers"]["by_width"] == {"3 bits": 14}
    assert record["kept_in_float"]["lm_head"].startswith("tied to")
    assert (out / "genai_config.json").is_file()
    assert main(["quantize", str(folder), "--out", str(out)]) == 2  # it exists


def damage(folder: Path, kind: str) -> str:
    """Break a checkpoint; gives what the error must name."""
    shard = sorted(folder.glob("*.safetensors"))[1]
    if kind == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "missing shard":
        shard.unlink()
    elif kind == "missing tensor":
        tensors = load_file(shard)
        gone = next(iter(tensors))
        save_file({n: t for n, t in tensors.items() if n != gone}, shard)
        return gone
    elif kind == "other shape":
        tensors = load_file(shard)
        odd = next(iter(tensors))
        save_file(tensors | {odd: torch.ones(3, 3)}, shard)
        return odd
    elif kind == "broken index":
        (folder / "model.safetensors.index.json").write_text("[]", "utf-8")
        return "weight_map"
    return shard.name


@pytest.mark.parametrize(
    "kind",
    ["truncated shard", "missing shard", "missing tensor", "other shape", "broken index"],
)
def test_a_broken_checkpoint_is_named_and_nothing_written(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = damage(folder, kind)
    assert main(["quantize", str(folder), "--out", str(tmp_path / "edge")]) == 2
    assert name in capsys.readouterr().err
    assert {f.name for f in tmp_path.iterdir()} == {"model"}


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy2(folder / "config.json", empty)
    with pytest.raises(UserInputError, match="no safetensors"):
        capture_checkpoint(empty)


def test_a_full_disk_is_seen_before_writing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    program = qc.quantize_groups(capture_checkpoint(folder))
    with pytest.raises(UserInputError, match="are free"):
        qc.export_model(program, tmp_path / "edge" / "model.onnx")
    assert not (tmp_path / "edge").exists()


@pytest.mark.slow
def test_a_correction_that_is_zero_is_written(tmp_path: Path) -> None:
    """Symmetric weights have integer zero-points, which is not known before they are computed."""
    torch.manual_seed(0)
    model: Any = llama()
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.dim() == 2):
            weight.copy_(torch.randint(-8, 8, weight.shape) / 64)
            weight[:, ::16], weight[:, 1::16] = -8 / 64, 7 / 64
    model.save_pretrained(tmp_path / "symmetric")
    quant, path = qc.QuantSpec(bits=4, group_size=16), tmp_path / "model.onnx"
    lazy = qc.quantize_groups(capture_checkpoint(tmp_path / "symmetric"), quant)
    qc.export_model(lazy, path, qc.ExportSpec(target="ort-stock"))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    corrections = [values for name, values in stored.items() if name.endswith(".correction")]
    assert corrections and not any(values.any() for values in corrections)


@pytest.mark.slow
def test_large_lazy_weights_go_into_an_external_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = qc.quantize_groups(capture_checkpoint(folder))
    qc.export_model(program, tmp_path / "inside.onnx")
    monkeypatch.setattr(initializers, "LAZY_INLINE_LIMIT_BYTES", 100)
    report = qc.export_model(program, tmp_path / "joined.onnx")
    assert set(report.files) == {"joined.onnx"}
    assert (tmp_path / "joined.onnx").stat().st_size == pytest.approx(
        (tmp_path / "inside.onnx").stat().st_size, rel=0.01
    )
    apart = qc.ExportSpec(external_data=True)
    report = qc.export_model(program, tmp_path / "external.onnx", apart)
    assert set(report.files) == {"external.onnx", "external.onnx_data"}
    inside, *others = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / n).graph.initializer}
        for n in ("inside.onnx", "joined.onnx", "external.onnx")
    )
    for stored in others:
        assert all(np.array_equal(values, stored[name]) for name, values in inside.items())

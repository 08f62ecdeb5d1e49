"""An interrupted export: nothing under the final name, and the next run goes on."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qalora_compile as qc
from qalora_compile.api.edge import EdgeParts
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.onnx import initializers
from qalora_compile.exporters.onnx.weight_file import WeightFile
from qalora_compile.files import atomic_folder
from qalora_compile.untrusted.artifacts import MODEL_FILE
from tests import forked
from tests.models import llama

WRITTEN = 9
"""Weights that are completely written when a run is interrupted."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model: Any = llama()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _weights_next_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initializers, "LAZY_INLINE_LIMIT_BYTES", 0)


def quantize(folder: Path, *options: str) -> int:
    return main(["quantize", str(folder), "--out", str(folder.parent / "edge"), *options])


def contents(edge: Path) -> dict[str, Any]:
    model = onnx.load(edge / MODEL_FILE)
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def ending_after(count: int, end: Callable[[], None]) -> Callable[..., Any]:
    """`WeightFile.add` that ends the run after so many weights."""
    original, calls = WeightFile.add, []

    def add(self: WeightFile, *args: Any) -> Any:
        calls.append(args[0])
        if len(calls) > count:
            end()
        return original(self, *args)

    return add


def fill_the_disk() -> None:
    raise OSError(28, os.strerror(28))


@pytest.mark.slow
def test_nothing_is_written_to_a_full_disk_and_another_plan_starts_anew(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(WeightFile, "add", ending_after(WRITTEN, fill_the_disk))
        assert quantize(folder) == 2
    assert "No space left" in capsys.readouterr().err
    assert not (folder.parent / "edge").exists()
    assert quantize(folder, "--bits", "3") == 0
    assert "weights were kept" not in capsys.readouterr().out
    assert sorted(p.name for p in folder.parent.iterdir()) == ["edge", "model"]


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = folder.parent / "edge"

    def kill_after_some() -> None:
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        WeightFile.add = ending_after(WRITTEN, kill)  # type: ignore[method-assign]  # in the child

    line = ["quantize", str(folder), "--out", str(edge)]
    assert forked.command(line, before=kill_after_some).wait()[0] == -signal.SIGKILL
    assert not edge.exists()

    made: set[str] = set()
    original = WeightFile.add

    def record(self: WeightFile, name: str, *args: Any) -> Any:
        made.add(name)
        return original(self, name, *args)

    monkeypatch.setattr(WeightFile, "add", record)
    assert quantize(folder) == 0
    assert f"{WRITTEN} weights were kept" in capsys.readouterr().out
    assert sorted(p.name for p in folder.parent.iterdir()) == ["edge", "model"]
    gone_on, count = contents(edge), len(made)
    assert quantize(folder, "--overwrite") == 0
    assert same(contents(edge), gone_on)
    assert len(made) == count + WRITTEN


@pytest.mark.slow
def test_the_key_tells_other_weights_and_other_options(folder: Path) -> None:
    program = qc.quantize_groups(capture_checkpoint(folder))
    parts = EdgeParts(
        description=folder,
        tokenizer=folder,
        record={},
        graphs={MODEL_FILE: program},
        spec=qc.ExportSpec(),
        library=None,
        weights=folder,
    )
    key = parts.key()
    assert parts.key() == key
    other = qc.ExportSpec(accuracy_level=4)
    assert dataclasses.replace(parts, spec=other).key() != key
    os.utime(folder / "model.safetensors", (0, 0))
    assert parts.key() != key


@pytest.mark.parametrize("fault", ["bit", "cut", "line"])
def test_what_is_damaged_is_written_again(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "weights"
    tensors = {f"t{i}": np.arange(i, i + 6, dtype=np.float32) for i in range(4)}
    keys = {name: (name, "FLOAT", [6]) for name in tensors}
    with pytest.raises(RuntimeError), WeightFile(path) as file:
        for name in list(tensors)[:3]:
            file.add(*keys[name], ir.Tensor(tensors[name]))
        raise RuntimeError
    journal = path.with_name("weights.journal")
    data = bytearray(path.read_bytes())
    if fault == "bit":
        data[30] ^= 1  # in the second
    path.write_bytes(data[:40] if fault == "cut" else data)
    if fault == "line":
        lines = journal.read_text("utf-8").splitlines()
        journal.write_text("\n".join([lines[0], lines[1][:20]]), "utf-8")
    with WeightFile(path) as file:
        found = {name: file.find(*keys[name]) for name in tensors}
        assert [name for name, entry in found.items() if entry] == ["t0"]
        assert file.find("t0", "FLOAT", [3, 2]) is None
        for name, tensor in tensors.items():
            found[name] = found[name] or file.add(*keys[name], ir.Tensor(tensor))
    assert not journal.exists()
    for name, tensor in tensors.items():
        entry = found[name]
        assert entry is not None
        stored = path.read_bytes()[entry.offset : entry.offset + entry.length]
        assert stored == tensor.tobytes()


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    busy = pytest.raises(UserInputError, match="another process")
    with atomic_folder(out, resume="key"), busy, atomic_folder(out, resume="key"):
        pytest.fail("two write the same output")

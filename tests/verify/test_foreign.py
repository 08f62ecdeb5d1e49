"""Folders of codes are read back by their formats' libraries, where these are installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.capture.source import load_source
from qalora_compile.errors import UserInputError
from qalora_compile.verify import foreign
from tests.capture.stored.models import rewrite
from tests.exporters.checkpoints import llama_and_program, made_whole, weight_of
from tests.models import scale_of, worst

UP = "model.layers.0.mlp.up_proj"
LIBRARIES = {
    "mlx": "mlx.core",
    "hqq": "hqq.core.quantize",
    "compressed-tensors": "compressed_tensors.compressors.pack_quantized.base",
}


def written(target: str, folder: Path, **options: Any) -> qc.Program:
    model, program = llama_and_program(3, 64)
    program = made_whole(program) if target in ("gptq", "compressed-tensors") else program
    qc.export_model(program, folder, qc.ExportSpec(target=target, **options), model=model)
    return program


def emptied(folder: Path, program: qc.Program) -> Any:
    """The model of a folder without the weights that it has on codes."""
    model = load_source(str(folder)).model
    with torch.no_grad():
        for site in program.plan.to_quantize():
            model.get_parameter(f"{site.name}.weight").fill_(torch.nan)
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", LIBRARIES)
def test_every_weight_is_the_librarys(target: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[target])
    program = written(target, tmp_path / "out", parameter_dtype=dtype)
    model = emptied(tmp_path / "out", program)
    assert foreign.put_library_weights_(model, tmp_path / "out") == f"{target}, 14 weights"
    bound = 1e-6 if dtype == "float32" else 4e-3
    for site in program.plan.to_quantize():
        wanted = weight_of(program, site)
        assert worst(model.get_parameter(f"{site.name}.weight"), wanted) <= bound * scale_of(wanted)


@pytest.mark.parametrize(
    ("target", "reader"),
    [
        ("gptq", "qalora-compile; GPTQModel is not asked"),
        ("safetensors", "qalora-compile"),
        ("float", "transformers"),
    ],
)
def test_who_reads_what_no_library_is_asked_for(target: str, reader: str, tmp_path: Path) -> None:
    written(target, tmp_path / "out")
    model = load_source(str(tmp_path / "out")).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert foreign.put_library_weights_(model, tmp_path / "out") == reader
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_library_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("hqq", tmp_path / "out")
    model = load_source(str(tmp_path / "out")).model
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    said = foreign.put_library_weights_(model, tmp_path / "out")
    assert said == "qalora-compile; hqq cannot be imported"


def test_what_a_library_cannot_read_is_no_weight(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    program = written("mlx", tmp_path / "out")
    model = emptied(tmp_path / "out", program)

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"][:, :-1].contiguous()

    rewrite(tmp_path / "out", cut)
    with pytest.raises(UserInputError, match="mlx cannot read the checkpoint") as caught:
        foreign.put_library_weights_(model, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out")


def test_another_librarys_reading_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model computes with is what the library gave, not what our reader did."""
    program = written("hqq", tmp_path / "out")
    model = load_source(str(tmp_path / "out")).model
    other = {UP: torch.ones_like(weight_of(program, program.plan[UP]))}
    monkeypatch.setitem(foreign._READERS, "hqq", lambda *_: other)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", ModuleType("hqq"))
    assert foreign.put_library_weights_(model, tmp_path / "out") == "hqq, 1 weights"
    assert torch.equal(model.get_parameter(f"{UP}.weight"), other[UP])

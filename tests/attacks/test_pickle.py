"""Pickles in every place where some tool keeps one: none is ever loaded."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.capture.load_source import load_source
from qalora_compile.capture.peft_adapters import read_peft_adapter
from qalora_compile.ir.safetensors_io import load_tensors
from tests.attacks.support import attack, cli, refused
from tests.fuzz.seeds import FORMATS


class Canary:
    """Leaves a file beside the folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def poisoned(path: Path, *, archive: bool = False) -> Path:
    """A pickle that acts when it is loaded; returns what it would make."""
    mark = path.parent.parent / "canary-was-here"
    raw = pickle.dumps({"w": Canary(mark)})
    if archive:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", raw)
            file.writestr("archive/version", "3\n")
    else:
        path.write_bytes(raw)
    return mark


WEIGHTS = {
    "CVE-2025-32434: a pickle of weights, which weights_only let act": ("pytorch_model.bin", False),
    "CVE-2026-24747: an archive of PyTorch": ("pytorch_model.bin", True),
    "a checkpoint of a trainer": ("model.pt", False),
    "a checkpoint of Lightning": ("last.ckpt", True),
    "a bare pickle": ("weights.pkl", False),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_pickled_weights_are_not_loaded(kind: str, folder: Path) -> None:
    """A folder or a file of pickled weights; the message says how to convert it safely."""
    name, archive = WEIGHTS[kind]
    FORMATS["HF config"].build(folder)
    (folder / "model.safetensors").unlink()
    mark = poisoned(folder / name, archive=archive)
    refused(lambda: load_source(str(folder)), folder, "pickle", "weights_only=True")
    refused(lambda: load_source(str(folder / name)), folder, "pickle")
    assert not mark.exists()


BESIDE = ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "pytorch_model.bin")


@pytest.mark.parametrize("name", BESIDE)
def test_cve_2026_1839_pickles_beside_safetensors_are_left_alone(name: str, folder: Path) -> None:
    """Trainers keep state in pickles beside the weights, and resumed from them without care."""
    FORMATS["HF config"].build(folder)
    mark = poisoned(folder / name)
    assert attack(lambda: load_source(str(folder)).kind, folder).value == "huggingface"
    assert not mark.exists()


def test_a_pickle_named_safetensors_is_no_safetensors(folder: Path) -> None:
    """The name of a file says nothing about what is in it."""
    mark = poisoned(folder / "model.safetensors")
    refused(lambda: load_tensors(folder / "model.safetensors"), folder)
    torch.save({"w": torch.ones(2)}, folder / "model.safetensors")
    refused(lambda: load_tensors(folder / "model.safetensors"), folder)
    assert not mark.exists()


def test_a_pickled_adapter_is_not_loaded(folder: Path) -> None:
    """PEFT falls back to adapter_model.bin."""
    FORMATS["PEFT"].build(folder)
    (folder / "adapter_model.safetensors").unlink()
    mark = poisoned(folder / "adapter_model.bin")
    refused(lambda: read_peft_adapter(folder), folder, "pickle")
    assert not mark.exists()


READERS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "inspect": lambda folder: cli("inspect", folder),
    "fold": lambda folder: cli("fold", folder, "--out", folder / "out"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("file", ["adapters.safetensors", "quantized.safetensors", "program.json"])
def test_cve_2026_1839_a_run_folder_with_pickles_in_place_of_its_files(
    file: str, reader: str, folder: Path
) -> None:
    """What a training is resumed or folded from is never a pickle."""
    shutil.rmtree(folder)
    FORMATS["run"].build(folder)
    mark = poisoned(folder / file)
    refused(READERS[reader](folder), folder)
    assert not mark.exists()

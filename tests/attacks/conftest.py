"""What readers import is imported before the first attack: a child is forked for each."""

from __future__ import annotations

import gc
import importlib
import json
from pathlib import Path

import pytest

from qalora_compile.cli.commands import COMMANDS
from qalora_compile.runtime.library import kernel_level, library_path

MODULES = (
    "accelerate",
    "gguf",
    "onnx.reference",
    "onnxruntime",
    "peft",
    "tokenizers",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.ggml",
    "qalora_compile.verify.numeric.compare_nodes",
    "qalora_compile.verify.proof.sampled_equality",
    *(f"qalora_compile.cli.{command}" for command in COMMANDS),
)


@pytest.fixture(scope="session", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    from qalora_compile.capture.load_source import load_source
    from tests.attacks.onnx_files import model, write
    from tests.fuzz.seeds import FORMATS

    for module in MODULES:
        importlib.import_module(module)
    scratch = tmp_path_factory.mktemp("warm")
    for name in ("HF config", "GGUF", "GPTQ", "ONNX", "program"):
        made = FORMATS[name]
        made.build(scratch / name)
        made.door(scratch / name)
    write(model(), scratch)
    if kernel_level() is not None:
        assert library_path().is_file()
    assert callable(load_source)
    assert json.loads((scratch / "HF config" / "config.json").read_text())["model_type"]
    gc.collect()
    gc.freeze()  # children's collectors need not look through all of this, and copy it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder beside which a secret lies."""
    from tests.attacks.support import plant_secret

    inside = tmp_path / "model"
    inside.mkdir()
    plant_secret(inside)
    return inside

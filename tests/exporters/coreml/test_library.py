"""A machine without coremltools, and options of other targets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from tests.models import OneLinear, adapted


def test_a_missing_library_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = qc.fold_adapters(adapted(OneLinear(32, 8).eval(), (torch.randn(2, 32),)))
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UnsupportedError, match="coremltools is needed to write") as caught:
        qc.export_model(program, tmp_path / "model.mlpackage", qc.ExportSpec(target="coreml"))
    assert "pip install 'qalora-compile[coreml]'" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("opset", 21),
        ("accuracy_level", 4),
        ("fusion", "ort"),
        ("parameter_dtype", "float16"),
        ("stateful", False),
        ("aot", True),
    ],
)
def test_options_of_other_targets_are_refused(option: str, value: object) -> None:
    with pytest.raises(UserInputError, match=f"{option} is {value!r} for target coreml"):
        qc.ExportSpec.from_json({"target": "coreml", option: value})

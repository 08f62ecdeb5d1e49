"""A machine without OpenVINO."""

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
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnsupportedError, match="openvino is needed to export") as caught:
        qc.export_model(program, tmp_path / "model.xml", qc.ExportSpec(target="openvino"))
    assert "pip install 'qalora-compile[openvino]'" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("opset", 21, "opset is 21 for target openvino"),
        ("accuracy_level", 4, "accuracy_level is 4 for target openvino"),
        ("fusion", "ort", "fusion is 'ort' for target openvino"),
        ("correction", "digits", "correction is 'digits' for target openvino"),
    ],
)
def test_options_of_onnx_are_refused(option: str, value: object, words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        qc.ExportSpec.from_json({"target": "openvino", option: value})


def test_state_is_an_option_of_openvino_alone() -> None:
    with pytest.raises(UserInputError, match="stateful is False for target ort"):
        qc.ExportSpec(target="ort", stateful=False)
    assert qc.ExportSpec(target="openvino", parameter_dtype="auto").stateful

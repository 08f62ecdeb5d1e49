"""Targets, and the options that each of them has."""

from __future__ import annotations

from typing import Any

import pytest

from qalora_compile.config import FUSIONS, ExportSpec
from qalora_compile.errors import QaloraError, UnsupportedError, UserInputError


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="'tflite'") as caught:
        ExportSpec(target="tflite")
    assert "ort-stock" in str(caught.value)
    assert isinstance(caught.value, QaloraError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "onnx", "opset": 20}, "target onnx needs 21"),
        ({"target": "onnx", "accuracy_level": 4}, "the session decides"),
        ({"target": "onnx", "accuracy_level": 2}, "the session decides"),
        ({"target": "ort-stock", "accuracy_level": 2}, "target ort has level 2"),
        ({"target": "gguf", "accuracy_level": 2}, "option of target ort"),
        ({"target": "onnx", "fusion": "ort"}, "standard operators only"),
        ({"fusion": "standard", "opset": 20}, "opset 23"),
        ({"target": "ort", "correction": "digits"}, "option of target ort-stock"),
        ({"target": "ort-stock", "parameter_dtype": "float16"}, "option of target ort"),
        ({"target": "gguf", "parameter_dtype": "float16"}, "option of target ort"),
        ({"target": "safetensors", "parameter_dtype": "float16"}, "option of target ort"),
        ({"target": "ort", "float_type": "f16"}, "option of target gguf"),
        ({"target": "mlx", "opset": 20}, "option of target ort"),
        ({"target": "gguf", "accuracy_level": 4}, "option of target ort"),
        ({"target": "hqq", "fusion": "none"}, "option of target ort"),
        ({"target": "gptq", "correction": "digits"}, "option of target ort-stock"),
        ({"target": "float", "allow_unfolded": True}, "option of target ort"),
        ({"target": "gguf", "float_type": "q4_0"}, "use one of q8_0"),
    ],
)
def test_options_of_another_target_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserInputError) as caught:
        ExportSpec(**options)
    assert words in str(caught.value.hint)


def test_each_target_has_its_opset() -> None:
    assert [ExportSpec(target=t).onnx_opset for t in ("ort", "ort-stock", "onnx")] == [20, 20, 21]
    assert ExportSpec(opset=18).onnx_opset == 18
    assert [ExportSpec(fusion=f).onnx_opset for f in FUSIONS] == [20, 23, 22]

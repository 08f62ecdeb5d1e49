"""Which release a requirement names, and what an export for it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from qalora_compile.config import ExportSpec
from qalora_compile.config.onnx_releases import RELEASES, release_of
from qalora_compile.errors import UserInputError


@pytest.mark.parametrize(
    ("requirement", "version"),
    [
        ("onnxruntime==1.18", "1.18"),
        ("onnxruntime==1.18.1", "1.18"),
        ("onnxruntime >= 1.20", "1.20"),
        ("onnxruntime==1.32.0", "1.32"),
    ],
)
def test_a_requirement_names_a_release(requirement: str, version: str) -> None:
    assert release_of(requirement).version == version
    assert ExportSpec(runtime=requirement).release == release_of(requirement)


@pytest.mark.parametrize(
    "requirement",
    ["onnxruntime==1.17", "onnxruntime==1.99", "onnxruntime", "onnxruntime-web==1.20", "1.18", ""],
)
def test_an_unknown_release_is_refused_with_the_list(requirement: str) -> None:
    with pytest.raises(UserInputError) as caught:
        ExportSpec(runtime=requirement)
    assert "1.18, 1.19" in str(caught.value.hint)


def test_newer_releases_take_what_older_ones_take() -> None:
    for old, new in pairwise(RELEASES):
        assert [int(part) for part in old.version.split(".")] < [
            int(part) for part in new.version.split(".")
        ]
        assert old.opset <= new.opset
        assert set(old.eight_bits) <= set(new.eight_bits)
        assert (old.bias, old.blocks, old.two_bits) <= (new.bias, new.blocks, new.two_bits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 23}, "that release takes opset 21"),
        ({"fusion": "standard"}, "that release takes opset 21"),
        ({"target": "onnx"}, "the nearest targets are ort-stock and ort"),
        ({"target": "gguf"}, "option of target ort"),
    ],
)
def test_what_the_release_does_not_take_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserInputError) as caught:
        ExportSpec(**options, runtime="onnxruntime==1.18")
    assert words in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "tflite"}, "use one of onnx, ort"),
        ({"format": "ort", "external_data": True}, "holds its weights itself"),
        ({"format": "ort", "target": "mlx"}, "option of target ort"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserInputError) as caught:
        ExportSpec(**options)
    assert words in str(caught.value.hint)

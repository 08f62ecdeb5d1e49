"""The metadata of exported models: what is written is read."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from qalora_compile.ir.onnx_metadata import OnnxLayer, OnnxMetadata, read_onnx_metadata

LAYER = OnnxLayer(
    site="fc",
    kind="linear",
    weight="fc.weight",
    decision="quantize",
    reason="matches",
    bits=4,
    group_size=32,
    k=64,
    n=8,
    bytes=300,
    shape=(8, 64),
)
METADATA = OnnxMetadata(
    version="1",
    target="ort",
    stage="folded",
    history=("a", "b"),
    signature={"inputs": [], "outputs": []},
    layers=(LAYER,),
    site_values={"fc": "y"},
)


def write(path: Path, text: str | None) -> Path:
    """A model with some text as its metadata."""
    graph = onnx.helper.make_graph([], "g", [], [])
    model = onnx.helper.make_model(graph)
    if text is not None:
        model.metadata_props.add(key=ONNX_METADATA_KEY, value=text)
    onnx.save(model, path)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_onnx_metadata(write(tmp_path / "m.onnx", METADATA.to_text())) == METADATA


def test_fields_of_later_versions_are_left_out(tmp_path: Path) -> None:
    value = json.loads(METADATA.to_text())
    value["layers"][0]["colour"] = "green"
    path = write(tmp_path / "m.onnx", json.dumps(value))
    assert read_onnx_metadata(path).layers == (LAYER,)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"k": True}, "k of a layer is True"),
        ({"shape": ["a"]}, "shape of a layer"),
        ({"site": None}, "site of a layer is None"),
    ],
)
def test_a_malformed_layer_is_refused(
    change: dict[str, object], problem: str, tmp_path: Path
) -> None:
    value = json.loads(METADATA.to_text())
    value["layers"][0] |= change
    with pytest.raises(UserInputError, match=problem):
        read_onnx_metadata(write(tmp_path / "m.onnx", json.dumps(value)))


def test_a_model_of_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="not exported by this package"):
        read_onnx_metadata(write(tmp_path / "m.onnx", None))

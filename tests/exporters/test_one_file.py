"""The exporter's own writer of one file, against onnx's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qalora_compile.exporters.onnx.one_file import _varint, join_weights
from qalora_compile.files import copying
from qalora_compile.untrusted.artifacts import data_file


def with_external_data(path: Path, sizes: list[int]) -> onnx.ModelProto:
    """A model of tensors in a second file, and one small tensor inside; returned as it was made."""
    generator = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(generator.standard_normal(size).astype(np.float32), f"w{index}")
        for index, size in enumerate(sizes)
    ]
    inside = numpy_helper.from_array(np.arange(3), "inside")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_size"])],
        [tensors[0], inside, *tensors[1:]],
        doc_string="Ünicode",
    )
    model = helper.make_model(graph, producer_name="test")
    model.metadata_props.add(key="a", value="b" * 300)
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    onnx.save(
        model, path, save_as_external_data=True, location=data_file(path).name, size_threshold=64
    )
    return kept


@pytest.mark.parametrize("sizes", [[17], [1000, 40, 33], [70_000, 17, 300]])
def test_the_file_is_the_one_that_onnx_reads(sizes: list[int], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    made = with_external_data(path, sizes)
    assert data_file(path).is_file()
    join_weights(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    read = onnx.load(path, load_external_data=False)
    assert read == made
    onnx.checker.check_model(path, full_check=True)


@given(st.integers(0, 2**62))
def test_lengths_are_those_of_protobuf(value: int) -> None:
    stored = onnx.TensorProto(dims=[value]).SerializeToString()  # a tag of one byte, an integer
    assert stored[1:] == _varint(value)


def test_a_write_that_fails_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    made = with_external_data(path, [100])
    monkeypatch.setattr(copying, "PIECE_BYTES", "not a size")
    with pytest.raises(TypeError):
        join_weights(path)
    read = onnx.load(path)
    assert [numpy_helper.to_array(t).tobytes() for t in read.graph.initializer] == [
        numpy_helper.to_array(t).tobytes() for t in made.graph.initializer
    ]

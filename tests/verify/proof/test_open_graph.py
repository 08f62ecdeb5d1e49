"""Exported encoder-decoder models: two graphs, each compared with its own program."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.verify import compare_nodes, named_inputs
from qalora_compile.verify.debug.report_page import verify_page
from qalora_compile.verify.debug.zero_points import effective_zero_points, zero_points
from qalora_compile.verify.proof.open_graph import open_graphs
from tests.verify.planted import program
from tests.zoo.entries import ENTRIES

FILES = ("encoder_model.onnx", "decoder_model.onnx")
Pair = tuple[qc.Program, tuple[qc.Program, qc.Program], Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A T5 as one program, as two programs, and exported."""
    torch.manual_seed(0)
    model = ENTRIES["t5"].build()
    complete = qc.quantize_groups(qc.capture_model(model, *ENTRIES["t5"].inputs(2, 7, 0)))
    parts = qc.split_encoder_decoder(complete, model)
    folder = tmp_path_factory.mktemp("edge")
    for file, part in zip(FILES, parts, strict=True):
        qc.export_model(part, folder / file, qc.ExportSpec(target="ort-stock"))
    return complete, parts, folder


def test_a_folder_of_two_graphs_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for file in FILES:
        (tmp_path / file).touch()
    for check in (compare_nodes, qc.prove_equivalence):
        with pytest.raises(UserInputError, match="two graphs") as caught:
            check(program("folded"), tmp_path)
        assert "split_encoder_decoder" in str(caught.value)


@pytest.mark.slow
def test_encoder_and_decoder_are_proved_and_compared_one_by_one(pair: Pair, tmp_path: Path) -> None:
    _, parts, folder = pair
    for file, part in zip(FILES, parts, strict=True):
        calls = named_inputs(part, 1)
        tried = {name: calls[name] for name in ("random 0", "long")}
        assert qc.prove_equivalence(part, folder / file, samples=1).check(allow_sampled=True)
        compare_nodes(part, folder / file, tried, levels=("all",)).check()
        model = onnx.load(folder / file)
        norm = next(t for t in model.graph.initializer if "layer_norm" in t.name)
        norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * 2, norm.name))
        onnx.save(model, tmp_path / file)
        assert not compare_nodes(part, tmp_path / file, tried, levels=("all",)).passed


@pytest.mark.slow
def test_a_page_shows_both_graphs_and_their_zero_points(pair: Pair) -> None:
    complete, _, folder = pair
    graphs = open_graphs(folder)
    assert [graph.label for graph in graphs] == [str(folder / file) for file in FILES]
    assert set(effective_zero_points(complete, graphs)) == set(zero_points(complete))
    _, kwargs = ENTRIES["t5"].inputs(2, 9, 1)
    report = qc.verify_equivalence(complete, folder, [kwargs], qc.Tolerance(max_rel=1e-3)).check()
    html = verify_page(report, complete, folder, title="both").html()
    shown = re.sub("<[^>]*>", "", html)
    assert [file for file in FILES if file not in shown] == []
    assert "; 0 moved by more" in shown

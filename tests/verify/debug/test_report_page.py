"""The page of `verify --html`, for each of the three checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.verify.debug.report_page import _by_layer
from qalora_compile.verify.debug.zero_points import effective_zero_points, zero_points
from qalora_compile.verify.proof.graphs.graph import Graph, Node, Tensor
from qalora_compile.verify.proof.open_graph import open_graph, open_graphs
from tests.models import MLP, adapted, randomize_adapters
from tests.pages.test_page import text_of as read
from tests.verify.planted import SPECS, program, with_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    source = randomize_adapters(adapted(MLP(40, 24, 8), (torch.randn(2, 40),)))
    folded = qc.fold_adapters(source)
    wrong = with_tensors(folded, {f"{folded.plan.sites[1].path}.offset": lambda t: t * 1.01})
    for name, saved in (("adapted", source), ("folded", folded), ("wrong", wrong)):
        saved.save(folder / name)
    qc.export_model(folded, folder / "model.onnx")
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--numeric", "--levels", "all"], ["one-hot", "optimization all"]),
        (
            ["--prove"],
            ["for all inputs", "multiple of storage rounding", "✓ PROVED", "1 in column"],
        ),
        (["--max-rel", "1e-3"], ["max_rel 0.001", "sqnr dB", "input 1"]),
    ],
)
def test_each_check_writes_its_page(
    words: list[str], says: list[str], folders: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    models = [str(folders / "folded"), str(folders / "model.onnx")]
    assert main(["verify", *models, *words, "--html", str(page)]) == 0
    text = read(page)
    settings = ("Settings", "bits 4", "group size", "seed 0")
    layers = ("Errors by layer", "Worst inputs", "layers.1", "onnx.Tanh")
    moved = ("distance of a zero-point", "shift of a zero-point", "; 0 moved by more than 0.0001")
    for part in (*settings, *says, *layers, *moved):
        assert part in text, part
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("candidate", ["folded", "model.onnx"])
def test_the_shift_of_zero_points_is_what_was_folded(
    candidate: str, folders: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    models = [str(folders / "adapted"), str(folders / candidate)]
    words = ["--numeric", *(["--levels", "all"] if candidate == "model.onnx" else [])]
    assert main(["verify", *models, *words, "--html", str(page)]) == 0
    before, after = (zero_points(qc.Program.load(folders / n)) for n in ("adapted", "folded"))
    moved = np.concatenate([(after[name] - before[name]).ravel() for name in before])
    text = read(page)
    assert "shift of a zero-point, in codes" in text
    assert f"{moved.size} zero-points of 2 weights" in text
    assert f"by up to {np.abs(moved).max():.3g} codes" in text and np.abs(moved).max() > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_zero_points_are_read_however_a_target_stores_them(name: str, tmp_path: Path) -> None:
    qc.export_model(program("folded"), tmp_path / "model.onnx", SPECS[name])
    expected = zero_points(program("folded"))
    for side in (tmp_path / "model.onnx", program(f"lowered:{name}")):
        found = effective_zero_points(program("adapted"), open_graphs(side))
        assert set(found) == set(expected) and len(found) == 5
        for path, values in expected.items():
            assert np.abs(found[path] - values).max() < 1e-5, path


def test_a_long_graph_is_shown_completely_by_layer(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalora_compile.verify.debug.report_page._LINES", 2)
    page, models = tmp_path / "page.html", [folders / "folded", folders / "model.onnx"]
    assert main(["verify", *map(str, models), "--prove", "--html", str(page)]) == 0
    text = read(page)
    assert "layers.0: " in text and "layers.1: " in text and "nodes more" not in text
    for node in (node for side in models for node in open_graph(side).nodes.values()):
        assert " ".join(node.line.split()) in text


def test_a_node_is_in_the_layer_that_its_name_or_what_it_reads_says() -> None:
    names = ("input", "layers.0.q/MatMul", "node_1", "node_2", "layers.10.q/Add", "node_3")
    reads = {3: "layers.1.norm.weight", 5: "model.norm.weight"}
    nodes = {
        f"v{i}": Node(
            f"v{i}", "op", (Tensor(reads[i]),) if i in reads else (), {}, f"v{i}", 0, name
        )
        for i, name in enumerate(names)
    }
    found = _by_layer(Graph("onnx", "", "", nodes, {}, {}, {}, {}, {}))
    assert {layer: [line.split()[0] for line in lines] for layer, lines in found.items()} == {
        "": ["v0", "v5"], "layers.0": ["v1", "v2"], "layers.1": ["v3"], "layers.10": ["v4"],
    }  # fmt: skip


def test_a_fault_is_on_its_page(folders: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    models = [str(folders / "adapted"), str(folders / "wrong")]
    assert main(["verify", *models, "--numeric", "--html", str(page)]) == 1
    text = read(page)
    assert "✗ DIFFERENT" in text and "layers.1: off by" in text
    assert 'class="verdict bad"' in page.read_text("utf-8")


def test_a_page_that_cannot_be_made_is_refused(folders: Path, tmp_path: Path) -> None:
    page = ["--html", str(tmp_path / "page.html")]
    models = [str(folders / "model.onnx"), str(folders / "folded")]
    assert main(["verify", *models, "--max-rel", "1e-3", *page]) == 2
    assert main(["verify", "--certificate", "any.json", *page]) == 2
    assert not (tmp_path / "page.html").exists()

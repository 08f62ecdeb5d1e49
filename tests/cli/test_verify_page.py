"""The page of `verify --html`, for each of the three checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.cli.verify_page import zero_points
from tests.models import MLP, adapted, randomize_adapters
from tests.pages.test_page import Reader
from tests.verify.planted import with_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    source = randomize_adapters(adapted(MLP(40, 24, 8), (torch.randn(2, 40),)))
    folded = qc.fold_adapters(source)
    wrong = with_tensors(folded, {f"{folded.plan.sites[1].path}.offset": lambda t: t * 1.01})
    for name, program in (("adapted", source), ("folded", folded), ("wrong", wrong)):
        program.save(folder / name)
    qc.export_model(folded, folder / "model.onnx")
    return folder


def read(path: Path) -> str:
    reader = Reader()
    html = path.read_text("utf-8")
    reader.feed(html)
    assert reader.open == [] and len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith("#") for link in reader.links), "it refers to nothing outside"
    return " ".join(reader.text.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--numeric", "--levels", "all"], ["Worst inputs", "one-hot", "optimization all"]),
        (["--prove"], ["for all inputs", "of what storing explains", "EQUAL"]),
        (["--max-rel", "1e-3"], ["max_rel 0.001", "sqnr dB"]),
    ],
)
def test_each_check_writes_its_page(
    words: list[str], says: list[str], folders: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    sides = [str(folders / "folded"), str(folders / "model.onnx")]
    assert main(["verify", *sides, *words, "--html", str(page)]) == 0
    text = read(page)
    for part in (*says, "Errors by layer", "distance of a zero-point", "layers.1", "onnx.Tanh"):
        assert part in text, part
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_shift_of_zero_points_is_what_was_folded(folders: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    sides = [str(folders / "adapted"), str(folders / "folded")]
    assert main(["verify", *sides, "--numeric", "--html", str(page)]) == 0
    before, after = (zero_points(qc.Program.load(side)) for side in sides)
    moved = np.concatenate([(after[name] - before[name]).ravel() for name in before])
    text = read(page)
    assert "shift of a zero-point, in codes" in text
    assert f"{moved.size} zero-points of 2 weights" in text
    assert f"by up to {np.abs(moved).max():.3g} codes" in text and np.abs(moved).max() > 0.1


def test_a_fault_is_on_its_page(folders: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    sides = [str(folders / "adapted"), str(folders / "wrong")]
    assert main(["verify", *sides, "--numeric", "--html", str(page)]) == 1
    text = read(page)
    assert "FAIL" in text and "layers.1: off by" in text


def test_a_page_that_cannot_be_made_is_refused(folders: Path, tmp_path: Path) -> None:
    page = ["--html", str(tmp_path / "page.html")]
    sides = [str(folders / "model.onnx"), str(folders / "folded")]
    assert main(["verify", *sides, "--max-rel", "1e-3", *page]) == 2
    assert main(["verify", "--certificate", "any.json", *page]) == 2
    assert not (tmp_path / "page.html").exists()

"""What is translated once for all programs of one graph is what each of them would give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.exporters.onnx import model, write
from tests.models import MLP, adapted, llama, slow, token_ids
from tests.translations import Translations


@pytest.fixture
def translations(monkeypatch: pytest.MonkeyPatch) -> Translations:
    """One for the test alone: what other tests have translated is not in it."""
    fresh = Translations(model.translate)
    monkeypatch.setattr(write, "translate", fresh)
    return fresh


def folded_llama(seed: int, *, masked: bool) -> qc.Program:
    torch.manual_seed(seed)
    ids = token_ids(2, 8)
    inputs = (ids, torch.ones_like(ids)) if masked else (ids,)
    return qc.fold_adapters(adapted(llama(num_hidden_layers=1), inputs))


def folded_mlp(seed: int, *, bits: int = 4) -> qc.Program:
    torch.manual_seed(seed)
    x = torch.randn(2, 48)
    return qc.fold_adapters(adapted(MLP(48, 32, 8).eval(), (x,), qc.QuantSpec(bits=bits)))


def contents(program: qc.Program, spec: qc.ExportSpec, folder: Path) -> dict[str, bytes]:
    """The files of an export."""
    folder.mkdir()
    qc.export_model(program, folder / "model.onnx", spec)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


MAKERS: dict[str, tuple[Callable[[int], qc.Program], qc.ExportSpec]] = {
    "lifted": (partial(folded_llama, masked=True), qc.ExportSpec()),
    "traced again": (partial(folded_llama, masked=False), qc.ExportSpec()),
    "unfused": (partial(folded_llama, masked=True), qc.ExportSpec(fusion="none")),
    "ort-stock": (folded_mlp, qc.ExportSpec(target="ort-stock")),
    "onnx": (folded_mlp, qc.ExportSpec(target="onnx")),
}


@pytest.mark.parametrize(
    "name", [name if name != "traced again" else slow(name)[0] for name in MAKERS]
)
def test_a_remembered_translation_is_a_fresh_one(
    name: str, translations: Translations, tmp_path: Path
) -> None:
    make, spec = MAKERS[name]
    contents(make(1), spec, tmp_path / "first")
    program = make(2)
    found = contents(program, spec, tmp_path / "again")
    assert translations.hits == 1
    with translations.off():
        assert contents(program, spec, tmp_path / "fresh") == found


def test_other_graphs_and_options_are_translated_anew(
    translations: Translations, tmp_path: Path
) -> None:
    stock = qc.ExportSpec(target="ort-stock")
    contents(folded_mlp(0), qc.ExportSpec(), tmp_path / "first")
    contents(folded_mlp(0, bits=8), qc.ExportSpec(), tmp_path / "bits")
    contents(folded_mlp(0), stock, tmp_path / "target")
    contents(folded_mlp(0), qc.ExportSpec(opset=22), tmp_path / "opset")
    assert translations.hits == 0
    contents(folded_mlp(1), stock, tmp_path / "weights")
    assert translations.hits == 1

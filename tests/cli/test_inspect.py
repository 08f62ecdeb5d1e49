"""`inspect`: every weight with kind, shape, decision and reason, readable in 80 columns."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from rich.console import Console

import qalora_compile as qc
from qalora_compile.api.inspect import group_equal_rows
from qalora_compile.cli import inspect as command
from qalora_compile.cli import ui
from qalora_compile.cli.main import main
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from tests.models import OneLinear, slow
from tests.zoo.entries import ENTRIES

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", params=[*slow("mixtral", "lstm"), "resnet", "looped"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folded model of the zoo, with its export in `edge`."""
    entry = ENTRIES[request.param]
    args, kwargs = entry.inputs(2, 16, 0)
    program = qc.quantize_groups(qc.capture_model(entry.build(), args, kwargs))
    folded = qc.fold_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))
    path = tmp_path_factory.mktemp("inspect") / entry.name
    folded.save(path)
    (path / "edge").mkdir()
    qc.export_model(folded, path / "edge" / "model.onnx")
    return path


def rows_of(capsys: Capture, *words: str) -> list[dict[str, Any]]:
    """The rows that `inspect --json` prints."""
    capsys.readouterr()
    assert main(["inspect", *words, "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["layers"]
    return rows


@pytest.mark.parametrize("part", ["", "edge"])
def test_every_weight_has_kind_shape_decision_and_reason(
    folder: Path, part: str, capsys: Capture
) -> None:
    rows = rows_of(capsys, str(folder / part))
    model = ENTRIES[folder.name].build()
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2:
            names[id(parameter)].add(name)
    found = {row["weight"] for row in rows}
    assert all(found & known for known in names.values())
    assert found <= set().union(*names.values())
    for row in rows:
        assert all(row[name] for name in ("path", "kind", "shape", "decision", "reason")), row
        assert (row["bits"] is not None) == (row["decision"] == "quantize")


def test_bytes_are_those_of_the_folder(folder: Path, capsys: Capture) -> None:
    rows = rows_of(capsys, str(folder))
    tensors = qc.Program.load(folder).tensors()
    owners = {row["weight"].removesuffix(".weight") for row in rows} | {r["weight"] for r in rows}
    counted = sum(
        t.numel() * t.element_size()
        for name, t in tensors.items()
        if name in owners
        or name.endswith((".qweight", ".scale", ".offset"))
        or (name.endswith(".weight") and t.dim() >= 2)
    )
    assert sum(row["bytes"] for row in rows) == counted


@pytest.mark.parametrize("options", [["--layers"], ["--group"]])
def test_it_fits_80_columns_and_cuts_nothing_off(
    folder: Path, options: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Console(highlight=False, width=80)
    for module in (ui, command):
        monkeypatch.setattr(module, "console", narrow)
    assert main(["inspect", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    plan = qc.Program.load(folder).plan
    assert f"quantized: {len(plan.to_quantize())} (linear map by a parameter)" in printed
    cells = [[c.strip() for c in line.split("│")] for line in printed.splitlines() if "│" in line]
    first = "".join(row[1] for row in cells)  # long names take several lines
    assert "--group" in options or all(site.name in first for site in plan)


def test_grouped_rows_add_up(folder: Path, capsys: Capture) -> None:
    single, grouped = rows_of(capsys, str(folder)), rows_of(capsys, str(folder), "--group")
    assert sum(row["count"] for row in grouped) == len(single)
    assert sum(row["bytes"] for row in grouped) == sum(row["bytes"] for row in single)
    assert len(grouped) < len(single) or folder.name == "lstm"


def row(path: str, **other: Any) -> dict[str, Any]:
    return {"path": path, "weight": f"{path}.weight", "bytes": 2, "reason": "r"} | other


def test_like_rows_become_ranges() -> None:
    paths = ["m.0.fc", "m.1.fc", "m.2.fc", "m.5.fc", "m.0.fc@2", "m.1.fc@2", "m.0.fc1", "head"]
    found = [(r["path"], r["count"]) for r in group_equal_rows([row(p) for p in paths])]
    assert found == [("m.{0..2,5}.fc", 4), ("m.{0..1}.fc@2", 2), ("m.0.fc1", 1), ("head", 1)]
    nested = group_equal_rows([row(f"m.{i}.e.{j}.w") for i in range(2) for j in range(3)])
    assert [(r["path"], r["count"]) for r in nested] == [("m.{0..1}.e.{0..2}.w", 6)]


def test_rows_that_differ_otherwise_stay_apart() -> None:
    rows = [row("m.0.fc", bits=4), row("m.1.fc", bits=4), row("m.2.fc", bits=3)]
    found = group_equal_rows(rows)
    assert [(r["path"], r["bits"], r["bytes"]) for r in found] == [
        ("m.{0..1}.fc", 4, 4),
        ("m.2.fc", 3, 2),
    ]


def test_the_overview_lists_no_layers_and_says_how_to_see_them(
    folder: Path, capsys: Capture
) -> None:
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    plan = qc.Program.load(folder).plan
    assert f"{len(plan.to_quantize())} of 4 bits in groups of 32" in " ".join(printed.split())
    assert "folded program" in printed
    assert "real (folded)" in printed
    assert "--group and --layers list the layers" in printed
    assert not any(site.name in printed for site in plan.to_quantize() if "." in site.name)
    assert main(["inspect", str(folder / "edge")]) == 0
    printed = capsys.readouterr().out
    assert "model for ort" in printed
    assert "│ real" in printed, "the file holds real zero-points"


@pytest.mark.parametrize("text", ["{", '{"layers": [{"site": "fc"}], "target": "ort-stock"}'])
def test_metadata_of_another_version_is_explained(
    text: str, tmp_path: Path, capsys: Capture
) -> None:
    program = qc.capture_model(OneLinear(32, 8), (torch.randn(2, 32),))
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(allow_unfolded=True))
    model = onnx.load(path)
    (entry,) = [p for p in model.metadata_props if p.key == ONNX_METADATA_KEY]
    entry.value = text
    onnx.save(model, path)
    assert main(["inspect", str(path)]) == 2
    shown = capsys.readouterr().err
    wanted = "is not valid JSON" if text == "{" else "is incomplete"
    assert f"metadata of model.onnx {wanted}" in shown

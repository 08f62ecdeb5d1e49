"""`export --target coreml`: from the option to the edge folder, verified and inspected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qalora_compile.cli.main import main

pytest.importorskip("coremltools", reason="coremltools is not installed")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folded(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coreml")
    run, out = str(folder / "run"), folder / "folded"
    train = ["finetune", str(model_folder), "--data", str(data_file), "--out", run]
    assert main([*train, "--steps", "3", "--lr", "0.02"]) == 0
    assert main(["fold", run, "--out", str(out)]) == 0
    return out


def test_a_folder_that_verify_runs(folded: Path, tmp_path: Path, capsys: Capture) -> None:
    edge = tmp_path / "edge"
    export = ["export", str(folded), "--out", str(edge), "--target", "coreml", "--no-kv-cache"]
    assert main(export) == 0
    assert "no Apple device ran the model" in capsys.readouterr().out
    files = {file.name for file in edge.iterdir()}
    assert {"model.mlpackage", "config.json", "qalora.json", "tokenizer.json"} <= files
    record = json.loads((edge / "qalora.json").read_text("utf-8"))
    assert (record["files"], record["kv_cache"]) == (["model.mlpackage"], False)
    assert main(["verify", str(folded), str(edge), "--max-rel", "1e-4", "--inputs", "2"]) == 0
    assert "values that coremltools infers" in capsys.readouterr().out.replace("\n", " ")
    for path in (edge, edge / "model.mlpackage"):
        assert main(["inspect", str(path), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["layers"]
        assert {row["zero-point"] for row in rows if row["bits"]} == {"real"}
    assert main(["verify", str(folded), str(edge), "--prove"]) == 2
    assert "no form in a proof" in capsys.readouterr().err.replace("\n", " ")


def test_a_key_value_cache_is_refused(folded: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "edge"
    assert main(["export", str(folded), "--out", str(out), "--target", "coreml"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "a key-value cache has no form in target coreml" in said
    assert "--no-kv-cache" in said
    assert not out.exists()

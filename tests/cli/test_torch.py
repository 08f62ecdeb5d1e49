"""`export --target torch`: from the option to the edge folder, verified and inspected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qalora_compile.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folded(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    run, out = str(folder / "run"), folder / "folded"
    train = ["finetune", str(model_folder), "--data", str(data_file), "--out", run]
    assert main([*train, "--steps", "3", "--lr", "0.02"]) == 0
    assert main(["fold", run, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-kv-cache"]])
def test_a_folder_that_verify_runs(
    options: list[str], folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    edge = tmp_path / "edge"
    assert main(["export", str(folded), "--out", str(edge), "--target", "torch", *options]) == 0
    assert "packed for processors with" in capsys.readouterr().out
    files = {file.name for file in edge.iterdir()}
    assert {"model.pt2", "config.json", "qalora.json", "tokenizer.json"} <= files
    record = json.loads((edge / "qalora.json").read_text("utf-8"))
    assert record["files"] == ["model.pt2"]
    assert record["kv_cache"] is ("--no-kv-cache" not in options)
    assert main(["verify", str(folded), str(edge), "--max-rel", "1e-4", "--inputs", "2"]) == 0
    assert "of torch" in capsys.readouterr().out
    assert main(["inspect", str(edge), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert {row["zero-point"] for row in rows if row["bits"]} == {"real"}
    assert main(["verify", str(folded), str(edge), "--prove"]) == 2
    assert "no form in a proof" in capsys.readouterr().err.replace("\n", " ")


def test_what_does_not_fit_is_refused_before_any_work(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "edge"
    export = ["export", str(folded), "--out", str(out), "--target", "torch"]
    for option, words in (
        (["--with-library"], "--with-library has no effect with target torch"),
        (["--preset", "fast"], "--preset is fast for target torch"),
        (["--no-state"], "stateful is False for target torch"),
    ):
        assert main([*export, *option]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()

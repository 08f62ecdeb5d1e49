"""`export --target openvino`: from the option to the edge folder, verified and inspected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qalora_compile.cli.main import main

pytest.importorskip("openvino", reason="openvino is not installed")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folded(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino")
    run, out = str(folder / "run"), folder / "folded"
    train = ["finetune", str(model_folder), "--data", str(data_file), "--out", run]
    assert main([*train, "--steps", "3", "--lr", "0.02"]) == 0
    assert main(["fold", run, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("options", [[], ["--no-state"], ["--no-kv-cache"]])
def test_a_folder_that_openvino_opens(
    options: list[str], folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    edge = tmp_path / "edge"
    assert main(["export", str(folded), "--out", str(edge), "--target", "openvino", *options]) == 0
    files = {file.name for file in edge.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "qalora.json"} <= files
    assert "tokenizer.json" in files
    assert "model.onnx" not in files
    record = json.loads((edge / "qalora.json").read_text("utf-8"))
    assert record["files"] == ["openvino_model.xml"]
    assert record["export"]["stateful"] is ("--no-state" not in options)
    assert record["kv_cache"] is ("--no-kv-cache" not in options)
    assert main(["verify", str(folded), str(edge), "--max-rel", "1e-4", "--inputs", "2"]) == 0
    assert "of OpenVINO's CPU plugin" in capsys.readouterr().out
    assert main(["inspect", str(edge), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert {row["zero-point"] for row in rows if row["bits"]} == {"real"}


def test_numbers_along_the_graph_and_a_certificate(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    edge, certificate = str(tmp_path / "edge"), tmp_path / "equal.json"
    assert main(["export", str(folded), "--out", edge, "--target", "openvino"]) == 0
    assert main(["verify", str(folded), edge, "--numeric", "--inputs", "1"]) == 0
    proving = ["verify", str(folded), edge, "--prove", "--certificate", str(certificate)]
    assert main(proving) == 3, "SAMPLED is no success"
    assert main([*proving, "--allow-sampled"]) == 0
    value = json.loads(certificate.read_text("utf-8"))
    assert {site["status"] for site in value["sites"]} == {"proved"}
    assert main(["verify", "--certificate", str(certificate)]) == 3
    assert main(["verify", "--certificate", str(certificate), "--allow-sampled"]) == 0


def test_what_does_not_fit_is_refused_before_any_work(
    folded: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "edge"
    export = ["export", str(folded), "--out", str(out), "--target", "openvino"]
    for option, words in (
        (["--with-library"], "--with-library has no effect with target openvino"),
        (["--preset", "fast"], "--preset is fast for target openvino"),
        (["--opset", "21"], "opset is 21 for target openvino"),
    ):
        assert main([*export, *option]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()

"""`finetune --adapter scale` and `--zero-point integer`, to a file without corrections."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.training.forward.autocast import has_bfloat16
from qalora_compile.training.records.log import read_log
from qalora_compile.untrusted.artifacts import model_file
from tests.models import slow


@pytest.mark.parametrize("options", [*slow((("--adapter", "scale"),)), ("--zero-point", "integer")])
def test_it_is_trained_folded_exported_and_verified(
    options: tuple[str, str],
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, folded, edge = (str(tmp_path / name) for name in ("run", "folded", "edge"))
    command = ["finetune", str(model_folder), "--data", str(data_file), "--out", run]
    assert (
        main([*command, *options, "--steps", "3", "--lr", "1e-2", "--gradient-checkpointing"]) == 0
    )
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge, "--target", "ort-stock"]) == 0
    assert main(["verify", folded, edge, "--max-rel", "1e-4"]) == 0
    graph = onnx.load(model_file(tmp_path / "edge"), load_external_data=False).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 15
    assert not [tensor.name for tensor in graph.initializer if "correction" in tensor.name]
    capsys.readouterr()
    assert main(["inspect", folded, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    kinds = {row["zero-point"] for row in rows if row["decision"] == "quantize"}
    assert kinds == {"integer"}


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
def test_it_is_trained_in_bfloat16(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        words = ["finetune", str(model_folder), "--data", str(data_file), "--out", str(out)]
        words += ["--adapter", "scale", "--steps", "4", "--lr", "1e-2", "--precision", precision]
        assert main(words) == 0
        losses.append([row["loss"] for row in read_log(out / "log.jsonl")])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

"""`export` to checkpoints, and `verify` on what it wrote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import pytest

import qalora_compile as qc
from qalora_compile.cli.main import main
from tests.exporters.checkpoint_cases import TEXT, causal_lm, write_tokenizer
from tests.models import capture_transformer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made from a GGUF file: two steps of training, folded."""
    root = tmp_path_factory.mktemp("work")
    model = causal_lm()
    tokenizer = write_tokenizer(root / "tokenizer")
    plain = qc.quantize_groups(capture_transformer(model))
    base, spec = root / "base.gguf", qc.ExportSpec(target="gguf")
    qc.export_model(plain, base, spec, model=model, tokenizer=tokenizer)
    data = root / "data.jsonl"
    data.write_text(json.dumps({"text": TEXT}) + "\n", "utf-8")
    run = ["finetune", str(base), "--data", str(data), "--out", str(root / "run")]
    assert main([*run, "--steps", "2", "--rank", "4", "--lr", "1e-2", "--exclude", "k_proj"]) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    return root / "folded"


@pytest.mark.slow
def test_gguf_is_written_and_verified(folded: Path, tmp_path: Path, capsys: Capture) -> None:
    edge = tmp_path / "edge"
    assert main(["export", str(folded), "--out", str(edge), "--target", "gguf"]) == 0
    said = capsys.readouterr().out
    assert said.index("scale: rounds(float16)") < said.index("layers on codes")
    assert {f.name for f in edge.iterdir()} == {"model.gguf", "export.json"}
    record = json.loads((edge / "export.json").read_text("utf-8"))
    assert record["capabilities"]["real zero-point"] == "rounds(float16 minimum)"
    assert {row["form"] for row in record["tensors"]} >= {"Q4_1", "F32"}
    for path in (edge, edge / "model.gguf"):
        assert main(["verify", str(folded), str(path), "--max-rel", "1e-2"]) == 0
    assert main(["verify", str(folded), str(edge), "--max-rel", "1e-7"]) == 1
    run = folded.parent / "run"
    kept, found = (gguf.GGUFReader(str(path)).fields for path in
                   (folded.parent / "base.gguf", edge / "model.gguf"))  # fmt: skip
    assert {n: f.contents() for n, f in kept.items()} == {n: f.contents() for n, f in found.items()}
    assert (run / "model" / "metadata.gguf").is_file()


def test_a_float_folder_is_written_and_verified(folded: Path, tmp_path: Path) -> None:
    edge = tmp_path / "edge"
    assert main(["export", str(folded), "--out", str(edge), "--target", "float"]) == 0
    names = {f.name for f in edge.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "export.json"} <= names
    assert main(["verify", str(folded), str(edge), "--max-rel", "1e-5"]) == 0
    assert main(["verify", str(folded.parent / "base.gguf"), str(edge), "--max-rel", "1e-5"]) == 1


def test_every_form_is_evaluated(folded: Path, tmp_path: Path, capsys: Capture) -> None:
    for target in ("gguf", "float", "mlx"):
        made = str(tmp_path / target)
        assert main(["export", str(folded), "--out", made, "--target", target]) == 0
    root = folded.parent
    paths = [root / "base.gguf", root / "run", folded, *map(tmp_path.joinpath, ("gguf", "float"))]
    paths.append(tmp_path / "mlx")
    capsys.readouterr()
    data = ["--data", str(root / "data.jsonl"), "--json"]
    assert main(["eval", *map(str, paths), *data]) == 0
    rows = json.loads(capsys.readouterr().out)
    forms = ["GGUF", "run", "folded", "GGUF", "float", "quantized checkpoint"]
    assert [row["form"] for row in rows] == forms
    trained = rows[1]["loss"]
    for row, tolerance in zip(rows[2:], (1e-4, 1e-2, 1e-4, 1e-2), strict=True):
        assert row["loss"] == pytest.approx(trained, rel=tolerance), row["form"]
    assert rows[0]["loss"] != pytest.approx(trained, abs=1e-3), "the base is another model"
    assert len({row["predicted"] for row in rows}) == 1


@pytest.mark.slow
def test_other_folders_are_written(folded: Path, tmp_path: Path, capsys: Capture) -> None:
    for target, module in (("mlx", "mlx.core"), ("hqq", "hqq"), ("safetensors", "")):
        edge = tmp_path / target
        assert main(["export", str(folded), "--out", str(edge), "--target", target]) == 0
        assert (edge / "model.safetensors").is_file()
        assert (edge / "tokenizer.json").is_file()
        capsys.readouterr()
        assert main(["verify", str(folded), str(edge), "--max-rel", "1e-5"]) == 0
        reader = target if module and importlib.util.find_spec(module) else "qalora-compile"
        assert f"is read back by {reader}" in " ".join(capsys.readouterr().err.split())
    for target in ("gptq", "compressed-tensors"):
        edge = tmp_path / target
        assert main(["export", str(folded), "--out", str(edge), "--target", target]) == 2
        assert not edge.exists()
    assert "zero-points have to be integers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--no-kv-cache"], ["--with-library"], ["--last-logits"], ["--opset", "21"]]
)
def test_options_of_onnx_are_refused(folded: Path, tmp_path: Path, options: list[str]) -> None:
    command = ["export", str(folded), "--out", str(tmp_path / "edge"), "--target", "gguf"]
    assert main([*command, *options]) == 2
    assert list(tmp_path.iterdir()) == []


def test_quantize_writes_onnx_alone(tmp_path: Path, capsys: Capture) -> None:
    command = ["quantize", str(tmp_path), "--out", str(tmp_path / "edge"), "--target", "mlx"]
    assert main(command) == 2
    assert "quantize writes ONNX models" in capsys.readouterr().err


def test_adapters_are_not_stored(folded: Path, tmp_path: Path, capsys: Capture) -> None:
    run = str(folded.parent / "run")
    assert main(["export", run, "--out", str(tmp_path / "edge"), "--target", "gguf"]) == 2
    assert "adapters are not folded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

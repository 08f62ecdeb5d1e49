"""`--embeddings`: from the option to the edge folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.ir.program import Program
from qalora_compile.runtime import kernel_level
from tests.verify.planted import with_tensors

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with a tied head, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("tied")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def layers(path: Path, capsys: Capture) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    return {row["path"]: row for row in json.loads(capsys.readouterr().out)["layers"]}


@pytest.mark.slow
def test_from_training_to_the_edge(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [n, n + 1, n + 2]}) + "\n" for n in range(8)))
    run, folded, edge = (str(tmp_path / name) for name in ("run", "folded", "edge"))
    train = ["finetune", str(folder), "--data", str(data), "--out", run, "--steps", "2"]
    assert main([*train, "--embeddings", "8", "--rank", "4"]) == 0
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge]) == 0
    assert main(["verify", folded, edge, "--max-rel", "1e-4"]) == 0
    if kernel_level():
        assert main(["verify", folded, edge, "--max-rel", "1e-4", "--library"]) == 0
    record = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))
    assert record["embeddings"] == {"bits": 8, "group_size": 32}
    assert record["layers"]["by_width"] == {"4 bits": 7, "8 bits": 2}
    trained = layers(tmp_path / "run", capsys)
    assert (trained["lm_head"]["bits"], trained["lm_head"]["rank"]) == (8, None)
    assert trained["lm_head"]["zero-point"] == "integer"
    assert trained["model.layers.0.mlp.up_proj"]["rank"] == 4
    exported = layers(tmp_path / "edge", capsys)
    assert exported["model.embed_tokens"]["bits"] == 8
    # Codes, one scale for both planes, and two planes of zero-points.
    assert exported["model.embed_tokens"]["bytes"] == 160 * 64 + 3 * 4 * 160 * 2


def put_table(folder: Path) -> None:
    """Give the model of a FOLDED folder a table that 8 bits hold exactly, as GGUF's Q8_0 does."""
    program = Program.load(folder)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (160, 2, 32), generator=generator)
    codes[..., 0] = 127
    table = (codes * 2.0**-11).reshape(160, 64)
    changed = with_tensors(program, {program.plan["lm_head"].weight: lambda _: table})
    record = (folder / "run.json").read_text("utf-8")
    shutil.copytree(folder / "model", folder.parent / "model")
    shutil.rmtree(folder)
    changed.save(folder)
    shutil.copytree(folder.parent / "model", folder / "model")
    (folder / "run.json").write_text(record, "utf-8")


@pytest.mark.slow
def test_the_default_and_the_presets(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [n, n + 1, n + 2]}) + "\n" for n in range(8)))
    run, folded = str(tmp_path / "run"), str(tmp_path / "folded")
    train = ["finetune", str(folder), "--data", str(data), "--out", run, "--steps", "2"]
    assert main(train) == 0
    assert main(["fold", run, "--out", folded]) == 0
    put_table(tmp_path / "folded")
    found = {}
    for name, options in {
        "default": [],
        "exact": ["--preset", "exact"],
        "fast": ["--preset", "fast"],
        "small": ["--preset", "small"],
        "mixed": ["--preset", "fast", "--accuracy-level", "0", "--embeddings", "float"],
        "web": ["--preset", "web"],
        "webgpu": ["--preset", "web", "--expansion", "nbits"],
    }.items():
        edge = str(tmp_path / name)
        assert main(["export", folded, "--out", edge, *options]) == 0
        record = json.loads((tmp_path / name / "qalora.json").read_text("utf-8"))
        found[name] = record["preset"] | {"bits": (record["embeddings"] or {}).get("bits")}
        tolerance = "1e-4" if name in ("default", "exact", "web", "webgpu") else "1e-1"
        assert main(["verify", folded, edge, "--max-rel", tolerance]) == 0
    assert {name: row["bits"] for name, row in found.items()} == {
        "default": 8, "exact": None, "fast": 8, "small": 4, "mixed": None, "web": 8, "webgpu": 8,
    }  # fmt: skip
    assert found["default"]["embedding_loss"] == 0
    assert found["small"]["embedding_loss"] > 1e-2
    assert [found[n]["accuracy_level"] for n in found] == [0, 0, 4, 0, 0, 0, 0]
    dtypes = [found[n]["parameter_dtype"] for n in found]
    assert dtypes == ["float32"] * 2 + ["float16"] * 3 + ["float32"] * 2
    assert {n: row["expansion"] for n, row in found.items() if "expansion" in row} == {
        "web": "float"
    }
    assert found["web"]["bytes"] < 1.1 * found["default"]["bytes"]
    assert found["small"]["bytes"] < found["default"]["bytes"] < found["exact"]["bytes"]
    assert found["exact"]["largest_movement"] < 1e-5 < found["fast"]["largest_movement"]
    for name in ("default", "web"):
        assert main(["verify", folded, str(tmp_path / name), "--prove"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("bits per weight", "weights in float, made at load"))


def test_quantize(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["quantize", str(folder), "--out", str(tmp_path / "edge")]
    assert main([*command, "--embeddings", "4", "--embeddings-group-size", "16"]) == 0
    rows = layers(tmp_path / "edge", capsys)
    assert {(rows[n]["bits"], rows[n]["group"]) for n in ("model.embed_tokens", "lm_head")} == {
        (4, 16)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embeddings-group-size", "32"], "no use without --embeddings"),
        (["--embeddings", "4", "--embeddings-group-size", "24"], "group_size of embeddings is 24"),
        (["--embeddings", "8", "--exclude", "lm_head"], "no embedding and no head"),
        (["--embeddings", "3"], "invalid choice"),
    ],
)
def test_bad_options(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "edge"
    try:
        code = main(["quantize", str(folder), "--out", str(out), *options])
    except SystemExit as stop:  # argparse
        code = int(str(stop.code))
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()

"""`--embeddings`: from the option to the edge folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.runtime import kernel_level

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

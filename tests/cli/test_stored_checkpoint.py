"""Checkpoints that are quantized already: taken as they are, trained on, folded, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qalora_compile as qc
from qalora_compile.capture.source import load_source
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from tests.capture.test_gptq import layer, settings_of
from tests.models import assert_close, token_ids

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def checkpoint(
    source: Path, folder: Path, *, method: str = "gptq", zero: int | None = None, **more: Any
) -> dict[str, Tensor]:
    """A model of random codes in some layers, on the floats of `source`; gives its weights."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = settings_of(method, group_size=32, **more)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = load_file(source / "model.safetensors")
    weights = {}
    for index in range(2):
        for name in LAYERS:
            path = f"model.layers.{index}.{name}"
            n, k = tensors.pop(f"{path}.weight").shape
            parts, _, weights[path] = layer(k, n, 4, 32, method=method, zero=zero)
            tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
            if method == "gptq":
                tensors[f"{path}.g_idx"] = (torch.arange(k) // 32).to(torch.int32)
                tensors[f"{path}.bias"] = torch.zeros(n)
    save_file(tensors, folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_is_taken_as_it_is(method: str, model_folder: Path, tmp_path: Path) -> None:
    weights = checkpoint(model_folder, tmp_path / "base", method=method)
    source = load_source(str(tmp_path / "base"))
    assert set(source.stored) == set(weights) and not source.notes
    program = qc.quantize_groups(source.capture(), stored=source.stored)
    rows = {site.path: site for site in program.plan}
    for path, stored in source.stored.items():
        assert (rows[path].bits, rows[path].group_size) == (4, 32)
        assert torch.equal(program.tensors()[f"{path}.qweight"], stored.qweight)
        assert torch.allclose(stored.dequantize().double(), weights[path], atol=1e-5)
    assert rows["model.layers.0.self_attn.k_proj"].decision == "keep"
    ids = token_ids(2, 7) % 13
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = source.model(**call).logits
    assert_close(program(**call)["logits"], expected, relative=1e-5)


def test_from_a_gptq_checkpoint_to_onnx(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Trained and folded, every code is the one of the checkpoint."""
    checkpoint(model_folder, tmp_path / "base")
    source = load_source(str(tmp_path / "base"))
    run, folded, edge = (str(tmp_path / name) for name in ("run", "folded", "edge"))
    words = ["finetune", str(tmp_path / "base"), "--data", str(data_file), "--out", run]
    assert main([*words, "--steps", "3", "--rank", "2", "--bits", "8"]) == 0
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge]) == 0
    assert main(["verify", run, edge, "--max-rel", "1e-4"]) == 0
    program = qc.Program.load(folded)
    for path, stored in source.stored.items():
        assert torch.equal(program.tensors()[f"{path}.qweight"], stored.qweight)
        assert torch.equal(program.tensors()[f"{path}.scale"], stored.scale)
        assert not torch.equal(program.tensors()[f"{path}.offset"], stored.offset)
    again = ["--out", str(tmp_path / "again"), "--steps", "0", "--rank", "2", "--requantize"]
    assert main([*words[:-2], *again, "--bits", "8"]) == 0
    anew = {site.path: site.bits for site in qc.Program.load(tmp_path / "again").plan}
    assert anew["model.layers.0.self_attn.k_proj"] == anew["model.layers.0.mlp.up_proj"] == 8


def test_zero_points_are_told_by_their_tag_and_by_their_numbers(
    model_folder: Path, tmp_path: Path
) -> None:
    symmetric: dict[str, Any] = {"zero": 8, "sym": True}
    right = checkpoint(model_folder, tmp_path / "right", **symmetric)
    checkpoint(model_folder, tmp_path / "wrong", checkpoint_format="gptq", **symmetric)
    checkpoint(model_folder, tmp_path / "untagged", checkpoint_format="gptq")
    path = "model.layers.0.mlp.up_proj"

    def weight(name: str, **options: Any) -> tuple[Tensor, tuple[str, ...]]:
        source = load_source(str(tmp_path / name), **options)
        return source.stored[path].dequantize().double(), source.notes

    plain, notes = weight("right")
    assert torch.allclose(plain, right[path], atol=1e-5) and not notes
    told, notes = weight("wrong")
    assert torch.equal(told, plain)
    assert "says that its zero-points are of format v1, but they are all 8" in notes[0]
    assert any("format v1" in note for note in load_source(str(tmp_path / "wrong")).capture().notes)
    as_tagged, notes = weight("wrong", zero_points="v1")
    scale = load_source(str(tmp_path / "right")).stored[path].scale.repeat_interleave(32, 1)
    assert torch.allclose(plain - as_tagged, scale.double(), atol=1e-6) and not notes
    one, two = (weight("untagged", zero_points=zeros)[0] for zeros in ("v1", "v2"))
    assert torch.equal(weight("untagged")[0], one) and not torch.equal(one, two)
    with pytest.raises(UserInputError, match="zero_points is 'v3'"):
        weight("right", zero_points="v3")


def test_a_checkpoint_that_does_not_fit_its_model_is_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    checkpoint(model_folder, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    whole = load_file(file)

    def refused(match: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, file)
        with pytest.raises(UserInputError, match=match):
            load_source(str(tmp_path / "base"))

    norm = "model.norm.weight"
    refused("model.norm.weight is missing", {n: t for n, t in whole.items() if n != norm})
    refused("odd.weight is of no part", whole | {"odd.weight": torch.ones(2)})
    refused("does not fit its config", whole | {norm: torch.ones(3)})
    elsewhere = {"model.layers.7.fc.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    refused("no such layer", whole | elsewhere)
    refused("holds no quantized layer", {norm: whole[norm]})

"""Weights that stay in their files are those that transformers loads, or the folder is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qalora_compile.capture.describe_model import model_config
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.capture.load_source import load_source
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.ir.lazy_tensor import materialize
from tests.models import llama, slow


def saved(folder: Path, *, tied: bool = False) -> Path:
    """A Llama of two layers as a folder."""
    torch.manual_seed(0)
    model: Any = llama()
    model.config.tie_word_embeddings = tied
    type(model)(model.config).save_pretrained(folder)
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def drop(folder: Path, *names: str) -> None:
    path = folder / "config.json"
    value = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({k: v for k, v in value.items() if k not in names}), "utf-8")


def rewrite(folder: Path, edit: Any) -> None:
    """Change the tensors of the only file."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def agrees_with_transformers(folder: Path) -> tuple[str, ...]:
    """Compare every tensor; gives the notes."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    program = capture_checkpoint(folder)
    compared = 0
    for name, tensor in program.tensors().items():
        if name in theirs:
            ours = materialize(tensor)
            assert ours.dtype == theirs[name].dtype, name
            assert torch.equal(ours, theirs[name]), name
            compared += 1
    assert compared >= len(dict(theirs)) - 1  # a tied head is read by one name
    return program.notes


@pytest.mark.slow
def test_a_head_that_is_not_the_embedding_is_used(tmp_path: Path) -> None:
    """Case 1: it became another model without a word."""
    folder = saved(tmp_path / "m", tied=True)
    head = torch.randn(load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": head})
    notes = agrees_with_transformers(folder)
    assert any("lm_head.weight is tied to" in note for note in notes)
    loaded: Any = load_source(str(folder)).model
    config = model_config(loaded)
    assert config is not None and config["tie_word_embeddings"] is False
    assert main(["quantize", str(folder), "--out", str(tmp_path / "edge"), "--bits", "8"]) == 0
    assert main(["verify", str(folder), str(tmp_path / "edge"), "--max-rel", "0.05"]) == 0


def test_a_head_that_equals_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", tied=True)
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert not any("tied" in note for note in agrees_with_transformers(folder))


def floats(dtype: torch.dtype, keep: str = "") -> Any:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t if keep and keep in n else t.to(dtype) for n, t in tensors.items()}

    return edit


@pytest.mark.parametrize(
    ("said", "held", "keep"),
    [
        *slow((None, torch.bfloat16, ""), ("float32", torch.bfloat16, "")),
        ("bfloat16", torch.float32, ""),
        ("bfloat16", torch.bfloat16, "norm"),
        ("float16", torch.bfloat16, ""),
    ],
)
def test_floats_are_cast_as_transformers_does(
    tmp_path: Path, said: str | None, held: torch.dtype, keep: str
) -> None:
    """Case 3: the configuration and the files name different dtypes."""
    folder = saved(tmp_path / "m")
    rewrite(folder, floats(held, keep))
    drop(folder, "dtype", "torch_dtype")
    if said is not None:
        change(folder, dtype=said)
    notes = agrees_with_transformers(folder)
    differs = said is not None and (keep != "" or said != str(held).removeprefix("torch."))
    assert any("cast, as transformers does" in note for note in notes) == differs


@pytest.mark.parametrize("reader", [capture_checkpoint, lambda f: load_source(str(f))])
def test_layers_that_the_model_lacks_are_refused(tmp_path: Path, reader: Any) -> None:
    """Case 4: half a model was read without a word."""
    folder = saved(tmp_path / "m")
    change(folder, num_hidden_layers=1)
    with pytest.raises(UserInputError, match=r"model\.layers\.1\..*does not have"):
        reader(folder)


def tensors_of(read: Any) -> dict[str, Tensor]:
    """Those of a program, or of the model of a source."""
    tensors = read.tensors() if hasattr(read, "tensors") else read.model.state_dict()
    return {name: materialize(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("reader", [capture_checkpoint, lambda f: load_source(str(f))])
def test_tensors_of_another_kind_are_passed_over(tmp_path: Path, reader: Any) -> None:
    folder = saved(tmp_path / "m")
    wanted = tensors_of(reader(folder))
    rewrite(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    found = tensors_of(reader(folder))
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_integers_for_floats_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    rewrite(folder, lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.int32)})
    with pytest.raises(UserInputError, match="int32"):
        capture_checkpoint(folder)

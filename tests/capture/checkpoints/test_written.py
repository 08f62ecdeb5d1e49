"""What this package writes, it reads: the same weights, and the same codes where it has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import QaloraError
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.recipes.reuse_codes import reuse_codes
from tests.exporters.checkpoint_cases import (
    causal_lm,
    folded,
    llama_and_program,
    made_whole,
    weight_of,
)
from tests.models import gpt2, randomize_adapters, slow, token_ids, worst

TARGETS = ("gguf", "mlx", "hqq", "safetensors", "gptq", "compressed-tensors")
WHOLE = ("gptq", "compressed-tensors")
UP = "model.layers.0.mlp.up_proj"


def written(target: str, folder: Path) -> tuple[Path, qc.Program]:
    """A folded llama in a format."""
    model, program = llama_and_program()
    if target in WHOLE:
        program = made_whole(program)
    path = folder / ("model.gguf" if target == "gguf" else "model")
    qc.export_model(program, path, qc.ExportSpec(target=target), model=model)
    return path, program


@pytest.mark.parametrize("target", TARGETS)
def test_weights_and_codes_come_back(target: str, tmp_path: Path) -> None:
    path, program = written(target, tmp_path)
    source = load_source(str(path))
    for site in program.plan.to_quantize():
        wanted = weight_of(program, site)
        found = source.model.get_parameter(f"{site.name}.weight").detach()
        bound = 1e-3 if target == "gguf" else 1e-6
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= bound
    annotated = AnnotateLinears(exclude=("lm_head",))(source.capture()).program
    kept = reuse_codes(annotated, source.stored()[0])
    assert len(kept.weights) == len(program.plan.to_quantize())


@pytest.mark.parametrize("target", ["gptq", *slow("safetensors")])
@pytest.mark.parametrize("targets", [["attn.c_proj"], *slow("all-linear")])  # those are square
def test_weights_that_are_stored_transposed_come_back(
    target: str, targets: str | list[str], tmp_path: Path
) -> None:
    model = gpt2()
    ids = token_ids(2, 8)
    captured = qc.capture_model(model, (ids,))
    spec = qc.QuantSpec(group_size=32)
    program = qc.insert_adapters(qc.quantize_groups(captured, spec, targets=targets))
    program = qc.fold_adapters(randomize_adapters(program))
    program = made_whole(program) if target in WHOLE else program
    qc.export_model(program, tmp_path / "model", qc.ExportSpec(target=target), model=model)
    source = load_source(str(tmp_path / "model"))
    again = source.capture()(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert worst(again, program(ids)) < 1e-4
    assert len(source.stored()[0]) == len(program.plan.to_quantize())


def test_transposed_weights_under_the_names_of_the_inner_model_come_back(tmp_path: Path) -> None:
    """GPT-2's own checkpoint begins its names with `h.`, not with `transformer.h.`."""
    model, ids = gpt2(), token_ids(2, 8)
    quantized = qc.quantize_groups(qc.capture_model(model, (ids,)), targets=["attn.c_proj"])
    program = made_whole(quantized)
    qc.export_model(program, tmp_path / "model", qc.ExportSpec(target="gptq"), model=model)
    file = tmp_path / "model" / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    assert any(name.startswith("h.0.attn.c_proj.") for name in tensors)
    save_file(tensors, file)
    again = load_source(str(tmp_path / "model")).capture()
    assert worst(again(input_ids=ids, attention_mask=torch.ones_like(ids)), program(ids)) < 1e-4


@pytest.mark.parametrize("target", WHOLE)
def test_biases_of_layers_come_back(target: str, tmp_path: Path) -> None:
    model = causal_lm(attention_bias=True)
    program = made_whole(folded(model))
    qc.export_model(program, tmp_path / "model", qc.ExportSpec(target=target), model=model)
    found = load_source(str(tmp_path / "model")).model
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    assert len(biases) == 8
    for name, bias in biases.items():
        assert float(bias.detach().abs().max()) > 0
        assert torch.equal(found.get_parameter(name), bias)


# Faults


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.{name}"] = tensors[f"{UP}.{name}"][..., :-1].contiguous()

    return change


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{UP}.{name}"]

    return change


FAULTS = {
    "codes cut": ("safetensors", cut("qweight"), "bytes a row"),
    "no offset": ("safetensors", without("offset"), "no tensor .*offset"),
    "scale cut": ("safetensors", cut("scale"), "scale is"),
    "words cut": ("compressed-tensors", cut("weight_packed"), "int32 words"),
    "no shape": ("compressed-tensors", without("weight_shape"), "no tensor .*weight_shape"),
    "zero-points cut": ("compressed-tensors", cut("weight_zero_point"), "groups"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_inconsistent_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    target, change, words = FAULTS[kind]
    path, _ = written(target, tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(QaloraError, match=words):
        load_source(str(path))


def compressed(
    folder: Path, say: dict[str, object], change: Callable[[dict[str, Tensor]], None]
) -> Path:
    """A compressed-tensors folder whose weights are said to be otherwise, and are."""
    path, _ = written("compressed-tensors", folder)
    config = json.loads((path / "config.json").read_text("utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= say
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("actorder", ["group", True])
def test_a_promised_order_of_compressed_tensors_that_is_missing_is_refused(
    actorder: object, tmp_path: Path
) -> None:
    path = compressed(tmp_path, {"actorder": actorder}, lambda tensors: None)
    with pytest.raises(QaloraError, match=r"no tensor .*weight_g_idx, and .* actorder: group"):
        load_source(str(path))


def test_promised_zero_points_of_compressed_tensors_that_are_missing_are_refused(
    tmp_path: Path,
) -> None:
    path = compressed(tmp_path, {"symmetric": False}, without("weight_zero_point"))
    with pytest.raises(QaloraError, match=rf"no tensor {UP}\.weight_zero_point"):
        load_source(str(path))


@pytest.mark.parametrize("actorder", ["weight", "static", None])
def test_an_order_that_leaves_columns_in_place_promises_nothing(
    actorder: object, tmp_path: Path
) -> None:
    path = compressed(tmp_path, {"actorder": actorder}, lambda tensors: None)
    assert load_source(str(path)).stored()[0]


def test_columns_of_compressed_tensors_in_permuted_groups(tmp_path: Path) -> None:
    """By the formula of the library's versions with `g_idx`: w[:, k] = s[:, g[k]] (q − z)."""
    g_idx: dict[str, Tensor] = {}

    def shuffle(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".weight_scale")]:
            module, scale = name.removesuffix(".weight_scale"), tensors[name]
            _, k = (int(size) for size in tensors[f"{module}.weight_shape"])
            order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
            plain = torch.arange(k) // (k // scale.shape[1])
            g_idx[module] = plain[order].to(torch.int32)
            tensors[f"{module}.weight_g_idx"] = g_idx[module]

    plain, _ = written("compressed-tensors", tmp_path / "plain")
    path = compressed(tmp_path / "apart", {"actorder": "group"}, shuffle)
    source, before = load_source(str(path)), load_source(str(plain)).stored()[0]
    stored = dict(zip(g_idx, before._tensors, strict=True))
    for module, groups in g_idx.items():
        affine, each = stored[module].affine, groups.long()
        wanted = affine.codes * affine.scale[:, each] + affine.offset[:, each]
        found = source.model.get_parameter(f"{module}.weight").detach()
        torch.testing.assert_close(found, wanted)
    assert "act-order" in source.stored()[0]._tensors[0].form


def test_another_version_of_our_folder_is_refused(tmp_path: Path) -> None:
    path, _ = written("safetensors", tmp_path)
    said = json.loads((path / "layers.json").read_text("utf-8"))
    (path / "layers.json").write_text(json.dumps(said | {"version": 9}))
    with pytest.raises(QaloraError, match="version 9"):
        load_source(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "float-quantized"}, "format 'float-quantized'"),
        ({"config_groups": {}}, "not quantized to integers in groups"),
    ],
)
def test_other_kinds_of_compressed_tensors_are_refused(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    path, _ = written("compressed-tensors", tmp_path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    config["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QaloraError, match=words):
        load_source(str(path))

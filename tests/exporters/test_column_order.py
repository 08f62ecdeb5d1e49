"""Weights of activation order: columns come back where they belong, or nothing is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.checkpoints import open_folder as stored_folder
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.checkpoints import gptq as gptq_format
from qalora_compile.exporters.checkpoints.named_tensors import Layer
from qalora_compile.ir.activation_order import column_orders
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.checkpoint_codes import CheckpointCodes, CheckpointWeight
from tests.capture.checkpoints.models import rewrite, weights_of, write_folder
from tests.capture.checkpoints.test_gptq import gptq_config, gptq_layer
from tests.exporters.decoders import DECODERS, config, tensors
from tests.models import randomize_adapters, scale_of, token_ids, worst

K, N, GROUP = 96, 64, 32


class Pair(nn.Module):
    """Two layers that read one input, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, N), nn.Linear(K, N)
        self.c = nn.Linear(N, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.b(x))


def sorted_pair(bits: int = 4, *, integer: bool = True) -> tuple[nn.Module, qc.Program]:
    """A program whose first two layers share an order, and the model with the weights it has."""
    torch.manual_seed(0)
    model, codes, order = Pair().eval(), CheckpointCodes(), torch.randperm(K)
    for layer, own in ((model.a, order), (model.b, order), (model.c, None)):
        n, k = layer.weight.shape
        groups = k // GROUP
        scale = torch.rand(n, groups).half().float() + 0.125
        zero = torch.randint(0, 2**bits, (n, groups)).float()
        offset = -scale * (zero if integer else zero + 0.3)
        values = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        stored = CheckpointWeight(GroupAffine(values, scale, offset, bits, GROUP), "test", own)
        codes.add(stored)
        with torch.no_grad():
            layer.weight.copy_(stored.dequantize())
    captured = qc.capture_model(model, (torch.randn(3, K),))
    return model, qc.quantize_groups(captured, stored=codes)


def test_weights_that_share_an_order_are_all_found() -> None:
    model, program = sorted_pair()
    orders = column_orders(program)
    assert orders.keys() == {"a", "b"}
    adapted = qc.insert_adapters(program, qc.AdapterSpec(rank=2))
    for later in (adapted, qc.fold_adapters(adapted)):
        found = column_orders(later)
        assert all(torch.equal(found[path], order) for path, order in orders.items())
    captured = qc.capture_model(model, (torch.randn(3, K),))
    assert column_orders(qc.quantize_groups(captured)) == {}


@pytest.mark.parametrize("integer", [True, False])
def test_floats_are_the_models_own_weights(integer: bool, tmp_path: Path) -> None:
    model, program = sorted_pair(integer=integer)
    qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="float"))
    found = {name: torch.from_numpy(t) for name, t in tensors(tmp_path / "out").items()}
    assert found.keys() == model.state_dict().keys(), "an order is no tensor of the model"
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_keeps_codes_and_says_their_groups(bits: int, tmp_path: Path) -> None:
    model, program = sorted_pair(bits)
    qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="gptq"))
    assert config(tmp_path / "out", "quantize_config.json")["desc_act"] is True
    for name in ("a", "b", "c"):
        weight = model.get_parameter(f"{name}.weight").detach()
        found = torch.from_numpy(DECODERS["gptq"](tmp_path / "out", name))
        assert worst(found, weight.double()) <= 2.0**-23 * scale_of(weight)
    groups = tensors(tmp_path / "out")
    assert np.array_equal(groups["c.g_idx"], np.arange(N) // GROUP)
    assert not np.array_equal(groups["a.g_idx"], np.arange(K) // GROUP)


def test_layers_that_gptq_has_as_floats_are_in_order_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, program = sorted_pair()

    def misfit(layer: Layer) -> str:
        return "odd" * (layer.name == "a")

    changed = dataclasses.replace(gptq_format._FORMAT, misfit=misfit)
    monkeypatch.setattr(gptq_format, "_FORMAT", changed)
    monkeypatch.setattr(gptq_format, "_misfit", misfit)
    qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="gptq"))
    found = torch.from_numpy(tensors(tmp_path / "out")["a.weight"])
    assert torch.equal(found, model.get_parameter("a.weight"))


@pytest.mark.parametrize("target", ["mlx", "hqq", "compressed-tensors"])
def test_formats_without_an_order_are_refused(target: str, tmp_path: Path) -> None:
    _, program = sorted_pair()
    spec = qc.ExportSpec(target=target)
    with pytest.raises(UnsupportedError, match="in activation order") as caught:
        qc.export_model(program, tmp_path / "out", spec)
    assert caught.value.where == "a"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("integer", [True, False])
def test_our_own_folder_keeps_codes_and_their_order(
    bits: int, integer: bool, tmp_path: Path
) -> None:
    model, program = sorted_pair(bits, integer=integer)
    report = qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="safetensors"))
    assert str(report.capabilities["activation order"]) == "exact"
    said, found = config(tmp_path / "out", "layers.json"), tensors(tmp_path / "out")
    assert said["version"] == 2, "readers of version 1 would put the columns elsewhere"
    assert {name for name, row in said["layers"].items() if row.get("ordered")} == {"a", "b"}
    assert "ordered" not in said["layers"]["c"]
    assert "c.order" not in found
    orders, stored = column_orders(program), program.tensors()
    for name in ("a", "b", "c"):
        weight = model.get_parameter(f"{name}.weight").detach()
        read = torch.from_numpy(DECODERS["safetensors"](tmp_path / "out", name))
        assert worst(read, weight.double()) <= 2.0**-23 * scale_of(weight)
        for part in ("qweight", "scale", "offset"):
            assert np.array_equal(found[f"{name}.{part}"], stored[f"{name}.{part}"].detach())
        if name != "c":
            assert found[f"{name}.order"].dtype == np.int32
            assert np.array_equal(found[f"{name}.order"], orders[name])


def test_our_own_folder_without_an_order_is_what_it_was(tmp_path: Path) -> None:
    program = qc.quantize_groups(qc.capture_model(Pair().eval(), (torch.randn(3, K),)))
    qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="safetensors"))
    said = config(tmp_path / "out", "layers.json")
    assert said["version"] == 1
    kept = {"bits", "group_size", "n", "k", "transposed", "whole_zero_points"}
    assert all(row.keys() == kept for row in said["layers"].values())
    parts = {name.rpartition(".")[2] for name in tensors(tmp_path / "out")}
    assert parts == {"qweight", "scale", "offset", "bias"}


def folded_of(base: Path) -> tuple[Source, qc.Program]:
    """A GPTQ folder in activation order as a model, and with random adapters folded in."""
    write_folder(base, gptq_layer([], act_order=True), gptq_config())
    source = load_source(str(base))
    program = qc.quantize_groups(source.capture(), stored=source.stored()[0])
    adapted = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))
    return source, qc.fold_adapters(adapted)


@pytest.mark.slow
def test_a_folded_model_of_activation_order_is_the_same_again(tmp_path: Path) -> None:
    source, folded = folded_of(tmp_path / "base")
    spec, out = qc.ExportSpec(target="safetensors"), tmp_path / "out"
    qc.export_model(folded, out, spec, model=tmp_path / "base")
    read = load_source(str(out))
    again = qc.quantize_groups(read.capture(), stored=read.stored()[0])
    assert all("act-order" in weight.form for weight in read.stored()[0]._tensors)
    mine, theirs = folded.tensors(), again.tensors()
    orders, others = column_orders(folded), column_orders(again)
    assert len(orders) == 14
    assert orders.keys() == others.keys()
    for path, order in orders.items():
        assert torch.equal(order, others[path])
        for part in ("qweight", "scale", "offset"):
            assert torch.equal(mine[f"{path}.{part}"], theirs[f"{path}.{part}"]), path
    ids = token_ids(2, 7)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert worst(folded(**given), again(**given)) == 0
    assert worst(folded(**given).logits, source.model(ids).logits) > 1e-3, "the adapters do nothing"
    qc.export_model(again, tmp_path / "twice", spec, model=out)
    for file in ("layers.json", "model.safetensors"):
        assert (tmp_path / "twice" / file).read_bytes() == (out / file).read_bytes()


def test_an_order_is_checked_before_a_model_is_built_and_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folded = folded_of(tmp_path / "base")
    folded.save(tmp_path / "folded")
    out = tmp_path / "out"
    qc.export_model(folded, out, qc.ExportSpec(target="safetensors"), model=tmp_path / "base")
    verify = ["verify", str(tmp_path / "folded"), str(out), "--max-rel", "1e-3"]
    assert main(verify) == 0
    order = "model.layers.0.mlp.up_proj.order"
    rewrite(out, lambda found: found.update({order: found[order].roll(1)}))
    assert main(verify) == 1, "columns elsewhere are another model"
    rewrite(out, lambda found: found.update({order: found[order].clamp(min=1)}))
    monkeypatch.setattr(stored_folder, "_build", None)
    with pytest.raises(UserInputError, match="does not name each column") as caught:
        load_source(str(out))
    assert order in str(caught.value.where)


def test_a_checkpoint_of_activation_order_goes_round(tmp_path: Path) -> None:
    wanted: list[Tensor] = []
    write_folder(tmp_path / "base", gptq_layer(wanted, act_order=True), gptq_config())
    source = load_source(str(tmp_path / "base"))
    program = qc.quantize_groups(source.capture(), stored=source.stored()[0])
    for target in ("gptq", "safetensors", "float"):
        qc.export_model(
            program, tmp_path / target, qc.ExportSpec(target=target), model=tmp_path / "base"
        )
        again = load_source(str(tmp_path / target))
        found = list(weights_of(again.model).values())
        for mine, theirs in zip(found, wanted, strict=True):
            assert worst(mine, theirs) <= 1e-6 * scale_of(theirs)
        assert len(again.stored()[0]) == (0 if target == "float" else 14)
    ids = token_ids(2, 7)
    logits = source.model(ids).logits
    assert worst(again.model(ids).logits, logits) <= 1e-5 * scale_of(logits)
    with pytest.raises(UnsupportedError, match="Q4_1 has no place"):
        qc.export_model(
            program, tmp_path / "m.gguf", qc.ExportSpec(target="gguf"), model=tmp_path / "base"
        )
    assert not (tmp_path / "m.gguf").exists()


def test_a_column_put_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = sorted_pair()
    monkeypatch.setattr(gptq_format, "unsorted", lambda values, _: values)
    qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="gptq"))
    found = torch.from_numpy(DECODERS["gptq"](tmp_path / "out", "a"))
    assert worst(found, model.get_parameter("a.weight").double()) > 0.1

"""Adapters of PEFT, written by the library itself and compared with its own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.peft_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    merge_,
    put_saved_,
    read_peft_adapter,
)
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.ir.low_rank import LowRankUpdate
from qalora_compile.passes.dequantize_groups import DequantizeGroups
from qalora_compile.passes.take_updates import losses, take_updates
from tests.models import assert_close, gpt2, llama, token_ids, worst

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
GROUP = 16


def base(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return llama()


def trained(model: nn.Module, config: Any, folder: Path, **options: Any) -> Any:
    """A PEFT model with an adapter of random values, saved."""
    wrapped = peft.get_peft_model(model, config)
    shake(wrapped)
    wrapped.save_pretrained(folder, **options)
    return wrapped.eval()


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS} | options)


def pooled(**options: Any) -> Any:
    """PEFT pools in GPTQ layers alone; its class for them works on any linear layer."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = lora(use_qalora=True, qalora_group_size=GROUP, **options)
    config._register_custom_module({nn.Linear: GPTQLoraLinear})
    return config


def on_codes(model: nn.Module, ids: Tensor) -> qc.Program:
    """The model quantized; its own weights become what the codes stand for."""
    program = qc.quantize_groups(qc.capture_model(model, (ids,)), qc.QuantSpec(group_size=GROUP))
    floats = DequantizeGroups()(program).program.tensors()
    with torch.no_grad():
        for site in program.plan.weights_to_quantize():
            model.get_parameter(site.weight).copy_(floats[f"{site.path}.dequantized"])
    return program


def updates_of(*adapters: Any) -> dict[str, list[LowRankUpdate]]:
    found: dict[str, list[LowRankUpdate]] = {}
    for adapter in adapters:
        for path, update in adapter.updates.items():
            found.setdefault(path, []).append(update)
    return found


PATTERNS: dict[str, dict[str, Any]] = {
    "plain scaling": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 5, r"model.layers.1.*.down_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 9},
    },
    "both": {"use_rslora": True, "rank_pattern": {"v_proj": 1}},
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_pooled_adapter_computes_and_folds_as_in_peft(kind: str, tmp_path: Path) -> None:
    model, ids = base(), token_ids(2, 9)
    program = on_codes(model, ids)
    wrapped = trained(model, pooled(**PATTERNS[kind]), tmp_path)
    adapter = read_peft_adapter(tmp_path)
    assert len(adapter.updates) == 6 and not adapter.saved
    adapted = take_updates(program, updates_of(adapter))
    with torch.no_grad():
        expected = wrapped(ids).logits
    assert worst(expected, program(ids)["logits"]) > 0.1
    assert_close(adapted(ids)["logits"], expected, relative=2e-6)
    assert_close(qc.fold_adapters(adapted)(ids)["logits"], expected, relative=2e-6)


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_plain_adapter_is_the_update_that_peft_merges(kind: str, tmp_path: Path) -> None:
    wrapped = trained(base(), lora(**PATTERNS[kind]), tmp_path)
    adapter = read_peft_adapter(tmp_path)
    for path, update in adapter.updates.items():
        layer = wrapped.base_model.model.get_submodule(path)
        delta = layer.get_delta_weight("default").detach().double()
        assert torch.allclose(update.matrix(delta.shape[1]), delta, atol=1e-7)
    ours, theirs = base(), wrapped.merge_and_unload()
    merge_(ours, updates_of(adapter))
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, relative=1e-6)


def test_a_weight_stored_the_other_way_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = gpt2(), token_ids(2, 9)
    torch.manual_seed(0)
    ours = gpt2()
    wrapped = trained(
        model, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), tmp_path
    )
    merge_(ours, updates_of(read_peft_adapter(tmp_path)))
    with torch.no_grad():
        assert_close(ours(ids).logits, wrapped(ids).logits, relative=1e-6)


def test_plain_lora_is_refused_with_what_would_be_lost(tmp_path: Path) -> None:
    model, ids = base(), token_ids(2, 9)
    program = on_codes(model, ids)
    trained(model, lora(), tmp_path)
    updates = updates_of(read_peft_adapter(tmp_path))
    with pytest.raises(PreconditionError, match=r"plain LoRA.*lose 9\d% of an update") as caught:
        take_updates(program, updates)
    assert "merge" in str(caught.value.hint)
    found = losses(program.plan, updates)
    adapted = take_updates(program, updates, approximate=True)
    tensors, folded = adapted.tensors(), qc.fold_adapters(adapted)
    for path, (update,) in updates.items():
        exact = update.matrix(program.plan[path].k)
        means = exact.unflatten(1, (-1, GROUP)).mean(2)  # the formula, written out
        moved = folded.tensors()[f"{path}.offset"] - tensors[f"{path}.offset"]
        assert torch.allclose(moved.double(), means, atol=1e-6)
        left = exact - means.repeat_interleave(GROUP, 1)
        assert found[path] == pytest.approx(float(left.norm() / exact.norm()), abs=1e-9)
        nudged = exact - (means + 1e-3).repeat_interleave(GROUP, 1)
        assert left.norm() < nudged.norm()


def test_a_coarser_pool_folds_and_a_finer_one_does_not(tmp_path: Path) -> None:
    model, ids = base(), token_ids(2, 9)
    program = qc.quantize_groups(qc.capture_model(model, (ids,)), qc.QuantSpec(group_size=8))
    finer = qc.quantize_groups(qc.capture_model(model, (ids,)), qc.QuantSpec(group_size=32))
    trained(model, pooled(), tmp_path)
    updates = updates_of(read_peft_adapter(tmp_path))
    folded = qc.fold_adapters(take_updates(program, updates)).tensors()
    path = "model.layers.1.mlp.down_proj"
    moved = folded[f"{path}.offset"] - program.tensors()[f"{path}.offset"]
    (update,) = updates[path]
    expected = update.matrix(program.plan[path].k)[:, ::8]
    assert torch.allclose(moved.double(), expected, atol=1e-6)
    with pytest.raises(PreconditionError, match=r"pools groups of 16.*groups of 32"):
        take_updates(finer, updates)


def test_several_adapters_are_added_up_exactly(tmp_path: Path) -> None:
    model, ids = base(), token_ids(2, 9)
    program = on_codes(model, ids)
    wrapped = peft.get_peft_model(model, pooled(), adapter_name="first")
    wrapped.add_adapter("second", pooled(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"]))
    shake(wrapped)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(UserInputError, match="holds 2 adapters: first, second"):
        read_peft_adapter(tmp_path)
    parts = [(tmp_path / "first", 0.5), (tmp_path / "second", -1.5)]
    adapters = [read_peft_adapter(folder, weight=weight) for folder, weight in parts]
    adapted = take_updates(program, updates_of(*adapters))
    assert adapted.plan["model.layers.0.self_attn.q_proj"].rank == 5
    assert adapted.plan["model.layers.0.self_attn.k_proj"].rank == 1
    for name, (_, weight) in zip(("first", "second"), parts, strict=True):
        for module in wrapped.modules():
            if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                module.scaling[name] *= weight
    wrapped.base_model.set_adapter(["first", "second"])
    with torch.no_grad():
        expected = wrapped.eval()(ids).logits
    assert_close(qc.fold_adapters(adapted)(ids)["logits"], expected, relative=3e-6)


def test_whole_parameters_that_were_saved_are_put_into_the_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        config = BertConfig(vocab_size=64, num_attention_heads=2, **size)
        return BertForSequenceClassification(config).eval()

    ours, ids = classifier(), torch.randint(0, 64, (2, 9))
    wrapped = peft.get_peft_model(
        classifier(), lora(target_modules=["query"], modules_to_save=["classifier"], bias="all")
    )
    shake(wrapped)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.3)
    wrapped.save_pretrained(tmp_path)
    adapter = read_peft_adapter(tmp_path)
    assert {"classifier.weight", "classifier.bias"} <= adapter.saved.keys()
    assert "bert.encoder.layer.0.attention.self.query.bias" in adapter.saved
    put_saved_(ours, [adapter])
    merge_(ours, updates_of(adapter))
    with torch.no_grad():
        assert_close(ours(ids).logits, wrapped.eval()(ids).logits, relative=1e-6)
    with pytest.raises(UserInputError, match="two adapters bring"):
        put_saved_(ours, [adapter, adapter])
    with pytest.raises(UserInputError, match="no such parameter"):
        put_saved_(llama(), [adapter])


def test_an_adapter_of_another_model_names_the_layer(tmp_path: Path) -> None:
    trained(base(), pooled(), tmp_path)
    updates = updates_of(read_peft_adapter(tmp_path))
    first = "model.layers.0.self_attn.q_proj"
    other = qc.quantize_groups(qc.capture_model(gpt2(), (token_ids(2, 9),)))
    with pytest.raises(UserInputError, match="no linear layer") as caught:
        take_updates(other, updates)
    assert str(caught.value.where).startswith("model.layers.0.")
    with pytest.raises(UserInputError, match="no linear layer"):
        merge_(gpt2(), updates)
    wide = {first: [LowRankUpdate(torch.ones(2, 3), torch.ones(64, 2), 1.0, GROUP)]}
    program = qc.capture_model(base(), (token_ids(2, 9),))
    with pytest.raises(UserInputError, match=r"for a layer of 48×64, the model's is 64×64"):
        take_updates(qc.quantize_groups(program, qc.QuantSpec(group_size=GROUP)), wide)
    with pytest.raises(UserInputError, match=r"for a layer of 48×64, the model's is 64×64"):
        merge_(base(), wide)
    kept = qc.quantize_groups(program, qc.QuantSpec(group_size=GROUP), exclude="q_proj")
    with pytest.raises(PreconditionError, match="no foldable adapter: excluded"):
        take_updates(kept, updates)
    head = {"lm_head": [LowRankUpdate(torch.ones(2, 64), torch.ones(128, 2), 1.0, None)]}
    with pytest.raises(UnsupportedError, match=r"that of model\.embed_tokens\.weight, lm_head"):
        merge_(base(), head)


REFUSED: dict[str, tuple[Any, str]] = {
    "dora": (lambda: lora(use_dora=True), "DoRA"),
    "bias of B": (lambda: lora(lora_bias=True), "its B has a bias"),
    "another start": (lambda: lora(init_lora_weights="pissa"), "fits no other"),
    "an embedding": (lambda: lora(target_modules=["embed_tokens"]), "embedding"),
    "another kind": (
        lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
        "of the kind IA3",
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of what it cannot merge
@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_adapters_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    peft.get_peft_model(base(), make()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        read_peft_adapter(tmp_path)
    assert message in f"{caught.value.what} {caught.value.hint}"


def change(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | settings), "utf-8")


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    trained(base(), pooled(), folder)
    whole, weights = load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE
    settings = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def refused(match: str, where: str, tensors: dict[str, Tensor] = whole, **odd: Any) -> None:
        save_file(tensors, weights)
        change(folder, **settings | odd)
        with pytest.raises(UserInputError, match=match) as caught:
            read_peft_adapter(folder)
        assert where in str(caught.value.where)

    refused("lora_B is missing", "q_proj", {n: t for n, t in whole.items() if n != name})
    refused("their ranks differ", "q_proj", whole | {name: torch.ones(64, 2)})
    refused("rank 3, adapter_config.json says 4", "proj", r=4)
    refused("lora_alpha is None", CONFIG_FILE, lora_alpha=None)
    refused("qalora_group_size is 0", CONFIG_FILE, qalora_group_size=0)
    refused("adapts no layer", WEIGHTS_FILE, {"base_model.model.x": torch.ones(2)})
    weights.write_bytes(b"\x10")
    with pytest.raises(UserInputError, match="truncated"):
        read_peft_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserInputError, match="never loaded") as caught:
        read_peft_adapter(folder)
    assert "weights_only=True" in str(caught.value.hint)
    with pytest.raises(UserInputError, match="holds no adapter_config"):
        read_peft_adapter(tmp_path / "none")

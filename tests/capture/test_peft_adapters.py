"""Adapters of PEFT, written by the library itself and compared with its own forward."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.peft_adapters import (
    WEIGHTS_FILE,
    as_pooled,
    merge_,
    put_saved_,
    read_peft_adapter,
)
from qalora_compile.capture.peft_settings import CONFIG_FILE, PeftSettings
from qalora_compile.config.choices import PEFT_POOLINGS
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.checkpoint_codes import CheckpointCodes, CheckpointWeight
from qalora_compile.ir.lora_update import LowRankUpdate
from qalora_compile.passes.dequantize_groups import DequantizeGroups
from qalora_compile.passes.recipes.import_lora import import_lora, losses
from tests.capture.checkpoints.models import linears
from tests.models import OneLinear, assert_close, gpt2, llama, token_ids, worst

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
    adapted = import_lora(program, updates_of(adapter))
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


def test_a_transposed_weight_is_merged(tmp_path: Path) -> None:
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
        import_lora(program, updates)
    assert "merge" in str(caught.value.hint)
    found = losses(program, updates)
    adapted = import_lora(program, updates, approximate=True)
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
    folded = qc.fold_adapters(import_lora(program, updates)).tensors()
    path = "model.layers.1.mlp.down_proj"
    moved = folded[f"{path}.offset"] - program.tensors()[f"{path}.offset"]
    (update,) = updates[path]
    expected = update.matrix(program.plan[path].k)[:, ::8]
    assert torch.allclose(moved.double(), expected, atol=1e-6)
    with pytest.raises(PreconditionError, match=r"pools groups of 16.*groups of 32"):
        import_lora(finer, updates)


def sorted_base(order: Tensor) -> tuple[qc.Program, Tensor]:
    """A layer whose codes have their columns in an order, and its weight in the model's order."""
    torch.manual_seed(0)
    n, k = 24, len(order)
    model, codes = OneLinear(k, n).eval(), CheckpointCodes()
    parts = torch.rand(n, k // GROUP) + 0.1, torch.randn(n, k // GROUP)
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    stored = CheckpointWeight(GroupAffine(values, *parts, 4, GROUP), "test", order)
    codes.add(stored)
    with torch.no_grad():
        model.fc.weight.copy_(stored.dequantize())
    captured = qc.capture_model(model, (torch.randn(3, k),))
    return qc.quantize_groups(captured, stored=codes), stored.dequantize()


def test_an_update_of_neighbours_does_not_fold_in_activation_order() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    program, weight = sorted_base(order)
    update = LowRankUpdate(torch.randn(2, 64 // GROUP), torch.randn(24, 2), 0.5, GROUP)
    with pytest.raises(PreconditionError, match=r"pools groups of 16, and .* activation order"):
        import_lora(program, {"fc": [update]})
    plain = LowRankUpdate(torch.randn(3, 64), torch.randn(24, 3), 0.5, None)
    updates = {"fc": [update, plain]}
    adapted = import_lora(program, updates, approximate=True)
    exact = (update.matrix(64) + plain.matrix(64))[:, order]
    means = exact.unflatten(1, (-1, GROUP)).mean(2).repeat_interleave(GROUP, 1)
    lost = float((exact - means).norm() / exact.norm())
    assert lost > 0.1
    assert losses(program, updates)["fc"] == pytest.approx(lost, abs=1e-9)
    near = torch.empty_like(means)
    near[:, order] = means
    x = torch.randn(5, 64)
    wanted = x.double() @ (weight.double() + near).T
    for found in (adapted(x), qc.fold_adapters(adapted)(x)):
        bias = program(torch.zeros(1, 64))
        assert worst(found - bias, wanted.float()) <= 1e-5 * float(wanted.abs().max())


def test_an_order_that_keeps_pooling_groups_intact_folds_exactly() -> None:
    inside = torch.stack([torch.randperm(32) for _ in range(2)]) + torch.tensor([[32], [0]])
    program, weight = sorted_base(inside.flatten())
    update = LowRankUpdate(torch.randn(2, 2), torch.randn(24, 2), 0.5, 32)
    updates = {"fc": [update]}
    assert losses(program, updates) == {"fc": 0.0}
    folded, x = qc.fold_adapters(import_lora(program, updates)), torch.randn(5, 64)
    wanted = x.double() @ (weight.double() + update.matrix(64)).T
    found = folded(x) - program(torch.zeros(1, 64))
    assert worst(found, wanted.float()) <= 1e-5 * float(wanted.abs().max())


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
    adapted = import_lora(program, updates_of(*adapters))
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


def test_full_parameters_that_were_saved_are_copied_into_the_model(tmp_path: Path) -> None:
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
    with pytest.raises(UserInputError, match="two adapters have"):
        put_saved_(ours, [adapter, adapter])
    with pytest.raises(UserInputError, match="no such parameter"):
        put_saved_(llama(), [adapter])


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of weights that are tied
@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_parameter_that_the_model_ties_is_refused(saved: str, tmp_path: Path) -> None:
    trained(base(), lora(modules_to_save=[saved]), tmp_path)
    adapter, ours = read_peft_adapter(tmp_path), base()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(UnsupportedError, match="which the model ties to") as caught:
        put_saved_(ours, [adapter])
    assert "model.embed_tokens.weight" in caught.value.what
    assert "lm_head.weight" in caught.value.what
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    # brought under both names with one value, it is what the model has room for
    values = torch.randn_like(ours.get_parameter("model.embed_tokens.weight"))
    names = "model.embed_tokens.weight", "lm_head.weight"
    both = dataclasses.replace(adapter, saved=dict.fromkeys(names, values))
    put_saved_(ours, [both])
    assert torch.equal(ours.get_parameter("model.embed_tokens.weight"), values)


def test_a_small_update_of_a_half_precision_model_is_not_rounded_away() -> None:
    path = "model.layers.0.self_attn.q_proj"
    update = LowRankUpdate(torch.randn(2, 64) * 0.01, torch.randn(64, 2) * 0.002, 1.0, None)
    exact, halves = base(), base().bfloat16()
    before = halves.get_parameter(f"{path}.weight").detach().double()
    assert merge_(exact, {path: [update]}) == {}
    wide = merge_(halves, {path: [update]})
    assert wide.keys() == {f"{path}.weight"}
    delta = update.matrix(64)
    lost = wide[f"{path}.weight"].double() - before - delta
    assert wide[f"{path}.weight"].dtype == torch.float32
    assert float(lost.norm()) < 1e-3 * float(delta.norm())
    rounded = halves.get_parameter(f"{path}.weight").detach().double() - before - delta
    assert float(rounded.norm()) > 0.5 * float(delta.norm()), "else there is nothing to keep"


def authors_adapter(
    folder: Path, *, model: nn.Module | None = None, odd: str = ""
) -> dict[str, Tensor]:
    """An adapter as the QA-LoRA authors' script saves it: A `[r, K / g]`, no word of pooling."""
    sizes = {name: (m.out_features, m.in_features) for name, m in linears(model or base())}
    folder.mkdir()
    tensors = {}
    for name, (n, k) in sizes.items():
        own = 2 * GROUP if name == odd else GROUP
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(3, k // own) * 0.2
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n, 3) * 0.2
    save_file(tensors, folder / WEIGHTS_FILE)
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "bias": "none", "lora_dropout": 0.0}
    (folder / CONFIG_FILE).write_text(json.dumps(said), "utf-8")
    return tensors


@pytest.mark.parametrize("pooling", PEFT_POOLINGS)
def test_an_adapter_of_the_authors_script_is_read_as_stated(pooling: str, tmp_path: Path) -> None:
    model, ids = base(), token_ids(2, 9)
    program = on_codes(model, ids)
    tensors = authors_adapter(tmp_path / "adapter")
    adapter = read_peft_adapter(tmp_path / "adapter")
    with pytest.raises(UserInputError, match="pooled in groups of 16") as caught:
        as_pooled(adapter, model, None)
    assert "--pooling mean" in str(caught.value.hint)
    with pytest.raises(UserInputError, match="of another model") as caught:
        import_lora(program, updates_of(adapter))
    assert "pools groups of 16" in str(caught.value.hint)
    stated = as_pooled(adapter, model, pooling)
    # the script's own forward: lora_B(lora_A(AvgPool1d(g)(x))) · alpha / r
    pool = nn.AvgPool1d(GROUP)
    factor = 5 / 3 * (1 if pooling == "mean" else GROUP)
    for name, module in linears(model):
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")

        def add(_: Any, args: Any, out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return out + factor * pool(args[0]) @ a.T @ b.T

        module.register_forward_hook(add)
    with torch.no_grad():
        expected = model(ids).logits
    adapted = import_lora(program, updates_of(stated))
    assert worst(expected, program(ids)["logits"]) > 0.1
    assert_close(adapted(ids)["logits"], expected, relative=3e-6)
    assert_close(qc.fold_adapters(adapted)(ids)["logits"], expected, relative=3e-6)


def test_an_adapter_that_does_not_pool_refuses_pooling(tmp_path: Path) -> None:
    trained(base(), lora(), tmp_path / "plain")
    trained(base(), pooled(), tmp_path / "pooled")
    for name, sizes in (("plain", "groups of 1"), ("pooled", "that it records")):
        adapter = read_peft_adapter(tmp_path / name)
        assert as_pooled(adapter, base(), None) is adapter
        with pytest.raises(UserInputError, match=sizes):
            as_pooled(adapter, base(), "mean")
    authors_adapter(tmp_path / "odd", odd="model.layers.1.mlp.up_proj")
    odd = read_peft_adapter(tmp_path / "odd")
    with pytest.raises(UserInputError, match="groups of 16, 32"):
        as_pooled(odd, base(), "mean")
    with pytest.raises(UserInputError, match="pooling is 'most'"):
        as_pooled(odd, base(), "most")
    with pytest.raises(UserInputError, match="no linear layer"):
        as_pooled(odd, gpt2(), "mean")


@pytest.mark.slow
def test_an_adapter_of_another_model_names_the_layer(tmp_path: Path) -> None:
    trained(base(), pooled(), tmp_path)
    updates = updates_of(read_peft_adapter(tmp_path))
    first = "model.layers.0.self_attn.q_proj"
    other = qc.quantize_groups(qc.capture_model(gpt2(), (token_ids(2, 9),)))
    with pytest.raises(UserInputError, match="no linear layer") as caught:
        import_lora(other, updates)
    assert str(caught.value.where).startswith("model.layers.0.")
    with pytest.raises(UserInputError, match="no linear layer"):
        merge_(gpt2(), updates)
    wide = {first: [LowRankUpdate(torch.ones(2, 3), torch.ones(64, 2), 1.0, GROUP)]}
    program = qc.capture_model(base(), (token_ids(2, 9),))
    with pytest.raises(UserInputError, match=r"for a layer of 48×64, the model's is 64×64"):
        import_lora(qc.quantize_groups(program, qc.QuantSpec(group_size=GROUP)), wide)
    with pytest.raises(UserInputError, match=r"for a layer of 48×64, the model's is 64×64"):
        merge_(base(), wide)
    kept = qc.quantize_groups(program, qc.QuantSpec(group_size=GROUP), exclude="q_proj")
    with pytest.raises(PreconditionError, match="no foldable adapter: excluded"):
        import_lora(kept, updates)
    head = {"lm_head": [LowRankUpdate(torch.ones(2, 64), torch.ones(128, 2), 1.0, None)]}
    with pytest.raises(UnsupportedError, match=r"shared by model\.embed_tokens\.weight, lm_head"):
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
    complete, weights = load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE
    settings = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def refused(match: str, where: str, tensors: dict[str, Tensor] = complete, **odd: Any) -> None:
        save_file(tensors, weights)
        change(folder, **settings | odd)
        with pytest.raises(UserInputError, match=match) as caught:
            read_peft_adapter(folder)
        assert where in str(caught.value.where)

    refused("lora_B is missing", "q_proj", {n: t for n, t in complete.items() if n != name})
    refused("their ranks differ", "q_proj", complete | {name: torch.ones(64, 2)})
    refused("rank 3, adapter_config.json says 4", "proj", r=4)
    refused("lora_alpha of .* is None", CONFIG_FILE, lora_alpha=None)
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


Q = ["q_proj"]
LAYERS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "a complete path": {"target_modules": ["model.layers.1.mlp.down_proj"]},
    "an expression": {"target_modules": r".*\.layers\.1\..*(q|v)_proj"},
    "a part of a path": {"target_modules": "q_proj"},
    "without some": {"target_modules": [*Q, "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    "without an expression": {"target_modules": Q, "exclude_modules": r".*\.0\..*"},
    "one layer": {"target_modules": Q, "layers_to_transform": 1},
    "layers": {"target_modules": Q, "layers_to_transform": [0, 7]},
    "no layers": {"target_modules": Q, "layers_to_transform": []},
    "a complete path and layers": {
        "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
        "layers_to_transform": [1],
    },
    "layers of a pattern": {
        "target_modules": Q, "layers_to_transform": [1], "layers_pattern": "layers"
    },
    "layers of several": {
        "target_modules": Q, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]
    },
    "experts": {"target_modules": ["w1"], "layers_to_transform": [3]},
    "no such pattern": {
        "target_modules": Q, "layers_to_transform": [1], "layers_pattern": ["h"]
    },
    "saved modules": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    "saved by an expression": {"target_modules": Q, "modules_to_save": [r"layers\.1"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layers_of_an_adapter_are_those_that_peft_adapts(kind: str, tmp_path: Path) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(**LAYERS[kind])
    config.save_pretrained(tmp_path)
    settings = PeftSettings.read(tmp_path)
    paths = [name for name, _ in linears(base())]
    paths += [f"model.layers.{i}.experts.{j}.w1" for i in (1, 3) for j in (1, 3)]
    paths += ["q_proj", "up_proj", "encoder.layers.1.layers.0.q_proj", "model.h.1.q_proj"]
    theirs = [bool(check_target_module_exists(config, path)) for path in paths]
    assert [settings.why_not(path) == "" for path in paths] == theirs
    assert not all(theirs)


def test_every_setting_of_peft_is_known_or_refused_by_name(tmp_path: Path) -> None:
    """A setting of a newer PEFT has to be looked at before it is allowed."""
    from qalora_compile.capture import peft_settings

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= peft_settings._KNOWN


def test_what_the_settings_leave_out_has_the_value_of_peft(tmp_path: Path) -> None:
    wrapped = trained(base(), lora(r=8, lora_alpha=8), tmp_path)
    path = tmp_path / CONFIG_FILE
    said = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({n: v for n, v in said.items() if n not in ("r", "lora_alpha")}))
    for name, update in read_peft_adapter(tmp_path).updates.items():
        delta = wrapped.base_model.model.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(update.matrix(delta.shape[1]), delta.detach().double(), atol=1e-7)


def test_an_adapter_that_peft_did_not_pool_is_plain_lora(tmp_path: Path) -> None:
    """PEFT pools in GPTQ layers alone, and saves `use_qalora` of any base."""
    model, ids = base(), token_ids(2, 9)
    program = on_codes(model, ids)
    ours = copy.deepcopy(model)
    wrapped = trained(model, lora(use_qalora=True, qalora_group_size=GROUP), tmp_path)
    updates = updates_of(read_peft_adapter(tmp_path))
    for take in (lambda: merge_(base(), updates), lambda: import_lora(program, updates)):
        with pytest.raises(UserInputError, match="PEFT pools only on GPTQ layers: this is plain"):
            take()
    change(tmp_path, use_qalora=False)
    merge_(ours, updates_of(read_peft_adapter(tmp_path)))
    with torch.no_grad():
        assert_close(ours(ids).logits, wrapped(ids).logits, relative=1e-6)

"""Which codes of a checkpoint the weights of a program keep, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.checkpoint_codes import CheckpointCodes, CheckpointWeight

N, K, GROUP = 16, 64, 32


def stored(seed: int, *, form: str = "A", act: bool = False) -> CheckpointWeight:
    """Random codes of a layer."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=random)
    scale, offset = (torch.rand(N, K // GROUP, generator=random) + 0.1 for _ in range(2))
    order = torch.randperm(K, generator=random) if act else None
    return CheckpointWeight(GroupAffine(codes, scale, offset, 4, GROUP), form, order)


def quantized(model: nn.Module, x: Tensor, *weights: CheckpointWeight) -> qc.Program:
    """The model with the codes that its checkpoint would hold."""
    codes = CheckpointCodes()
    for weight in weights:
        codes.add(weight)
    return qc.quantize_groups(qc.capture_model(model, (x,)), stored=codes)


def layers(*weights: Tensor) -> nn.Module:
    """Linear layers with these weights, one after another."""
    made = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    with torch.no_grad():
        for layer, weight in zip(made, weights, strict=True):
            layer.weight.copy_(weight)
    return nn.Sequential(*made)


def test_a_weight_without_codes_says_so() -> None:
    held = stored(1)
    model = layers(held.dequantize(), torch.randn(2 * N, N))
    plan = quantized(model, torch.randn(3, K), held).plan
    why = {site.path: site.why_bits for site in plan.to_quantize()}
    assert why == {
        "0": "A, as stored",
        "1": "the checkpoint has no codes for it: quantized by the options",
    }


def test_rows_of_zeros_are_no_codes_of_a_float_weight() -> None:
    """A scale of 0 stands for a row that other weights have too."""
    held = stored(1)
    held.affine.scale[3], held.affine.offset[3] = 0, 0
    weight = torch.randn(N, K)
    weight[5] = 0
    (site,) = quantized(layers(weight), torch.randn(3, K), held).plan.to_quantize()
    assert "no codes for it" in site.why_bits


def experts(*weights: CheckpointWeight) -> tuple[nn.Module, Tensor]:
    """A model of one layer whose experts' last matrices are these."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=N,
        intermediate_size=K,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=len(weights),
        use_cache=False,
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter.copy_(torch.stack([weight.dequantize() for weight in weights]))
    return model, torch.randint(0, 64, (2, 8))


def test_experts_keep_their_codes() -> None:
    held = stored(1), stored(2)
    plan = quantized(*experts(*held), *held).plan
    (site,) = [site for site in plan.to_quantize() if "experts.down_proj" in site.path]
    assert site.why_bits == "A, as stored"


# Faults


@pytest.mark.parametrize(
    ("second", "given", "words"),
    [
        (stored(2, act=True), True, "activation order, each in a different one"),
        (stored(2, form="B"), True, "different formats: A in groups of 32, B in groups of 32"),
        (stored(2), False, "some of its rows"),
    ],
)
def test_experts_whose_codes_cannot_be_kept_are_refused(
    second: CheckpointWeight, given: bool, words: str
) -> None:
    first = stored(1, act=second.order is not None)
    model, ids = experts(first, second)
    with pytest.raises(UnsupportedError, match=words) as caught:
        quantized(model, ids, *((first, second) if given else (first,)))
    assert "experts.down_proj" in str(caught.value.where)


@pytest.mark.parametrize("kind", ["rows without codes", "different formats"])
def test_a_weight_that_is_stored_in_parts_is_refused(kind: str) -> None:
    """Fused layers: quantizing them anew would lose what the checkpoint has of them."""
    above, below = stored(1), stored(2, form="B")
    kept = (above,) if kind == "rows without codes" else (above, below)
    model = layers(torch.cat([above.dequantize(), below.dequantize()]))
    with pytest.raises(
        UnsupportedError, match="some of its rows, or in different formats"
    ) as caught:
        quantized(model, torch.randn(3, K), *kept)
    assert caught.value.where == "0"


def test_a_weight_in_another_dtype_is_refused() -> None:
    held = stored(1)
    model = layers(held.dequantize(), torch.randn(2 * N, N)).bfloat16()
    with pytest.raises(UnsupportedError, match="bfloat16, but codes are found by"):
        quantized(model, torch.randn(3, K).bfloat16(), held)

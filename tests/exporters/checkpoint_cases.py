"""What the tests of checkpoints share: small models, folded programs, a tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.site_plan import Site
from qalora_compile.quantizers.minmax import quantize_integer_zero
from tests.models import adapted, token_ids

VOCABULARY, HIDDEN = 300, 64
TEXT = "The railway line opened in 1923, and 45 trains ran on it each day; it's gone."


def causal_lm(kind: str = "llama", **changes: Any) -> nn.Module:
    """A model of two layers with grouped heads and random weights."""
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    if kind == "mistral":
        sizes["head_dim"] = 16
    if kind == "qwen3":
        sizes["head_dim"] = 128  # transformers reads no other from a GGUF file
    config = getattr(transformers, f"{names[kind]}Config")(**(sizes | changes))
    config.use_cache = False
    torch.manual_seed(3)
    model: nn.Module = getattr(transformers, f"{names[kind]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def folded(model: nn.Module, bits: int = 4, group_size: int = 32) -> qc.Program:
    """The model quantized, adapted with random adapters, and folded."""
    quant = qc.QuantSpec(bits=bits, group_size=group_size)
    return qc.fold_adapters(adapted(model, (token_ids(2, 16),), quant))


@cache
def llama_and_program(bits: int = 4, group_size: int = 32) -> tuple[nn.Module, qc.Program]:
    """A small Llama and its folded program."""
    model = causal_lm()
    return model, folded(model, bits, group_size)


def affine_of(program: qc.Program, site: Site) -> GroupAffine:
    """The weight of a site on codes."""
    tensors = program.tensors()
    assert site.bits is not None
    assert site.group_size is not None
    codes = unpack_codes(tensors[f"{site.path}.qweight"], site.bits, site.k)
    scale, offset = (tensors[f"{site.path}.{part}"].detach() for part in ("scale", "offset"))
    return GroupAffine(codes, scale, offset, site.bits, site.group_size)


def weight_of(program: qc.Program, site: Site) -> Tensor:
    """The weight of a site as floats."""
    return affine_of(program, site).dequantize()


def write_tokenizer(folder: Path, *, digits: bool = True) -> Path:
    """A byte-level BPE tokenizer that cuts digits apart, as SmolLM's does, or as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 10,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>"
    ).save_pretrained(folder)
    return folder


def with_integer_zeros(program: qc.Program) -> qc.Program:
    """The program with its layers quantized again, to integer zero-points."""
    tensors, changes = program.tensors(), {}
    for site in program.plan.to_quantize():
        assert site.bits is not None
        assert site.group_size is not None
        weight = weight_of(program, site)
        affine = quantize_integer_zero(weight, site.bits, site.group_size)
        parts = (affine.pack(), affine.scale, affine.offset)
        for part, tensor in zip(("qweight", "scale", "offset"), parts, strict=True):
            tensors[f"{site.path}.{part}"] = tensor
        changes[site.name] = {"frozen_integer_zero": True}
    plan = program.plan.update(changes)
    return program.evolve(graph=program.copy_graph(), tensors=tensors, plan=plan)

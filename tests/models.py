"""Tiny models, and the helpers that tests of every room share."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qalora_compile as qc
from qalora_compile.ir.stages import TRAINED_NAMES

VOCABULARY = 128
HIDDEN = 64
COMPLETE = bool(os.environ.get("QALORA_ALL"))
"""Whether slow tests take every variant of what they show, as in `make test-complete`."""


class MLP(nn.Module):
    """Linear layers with a nonlinearity between them."""

    def __init__(self, *sizes: int, bias: bool = True) -> None:
        super().__init__()
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=bias) for k, n in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers in order."""
        for index, layer in enumerate(self.layers):
            x = layer(torch.tanh(x) if index else x)
        return x


class OneLinear(nn.Module):
    """A single linear layer called `fc`."""

    def __init__(self, k: int, n: int, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(k, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.fc(x)


class UsedTwice(nn.Module):
    """One linear layer that is called twice."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the shared layer, then again to its own output."""
        return self.head(self.shared(torch.relu(self.shared(x))))


class TiedHead(nn.Module):
    """An embedding whose weight is also the output projection."""

    def __init__(self, vocabulary: int = 48, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mid = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each position."""
        return self.lm_head(torch.tanh(self.mid(self.embed(ids))))


class SquareConv1D(nn.Module):
    """GPT-2's Conv1D with a square weight: a missed transpose changes no shape."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_proj = Conv1D(width, width)
        nn.init.normal_(self.c_proj.weight, std=0.05)
        nn.init.normal_(self.c_proj.bias, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.c_proj(x)


class ThreeReaders(nn.Module):
    """Three projections of one tensor, as q, k and v."""

    def __init__(self, width: int = 64, out: int = 32) -> None:
        super().__init__()
        self.q = nn.Linear(width, out)
        self.k = nn.Linear(width, out)
        self.v = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """A product that needs all three."""
        return self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)


def bert() -> nn.Module:
    """A two-layer BERT encoder with random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def gpt2() -> nn.Module:
    """A two-layer GPT-2 with its tied head and random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.use_cache = False
    return GPT2LMHeadModel(config).eval()


def llama(**settings: Any) -> nn.Module:
    """A two-layer Llama with grouped key-value heads, tied embeddings and random weights.

    Args:
        settings: Of its configuration, in place of those here.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = LlamaConfig(**sizes | settings)
    config.use_cache = False
    return LlamaForCausalLM(config).eval()


def slow(*values: object) -> list[Any]:
    """Parameters of a test that is slow with them; a tuple holds several."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


def complete(*values: object) -> list[Any]:
    """Further parameters of a kind that others show as well: `make test-complete` runs them too."""
    return slow(*values) if COMPLETE else []


TRANSFORMERS = {"bert": bert, "gpt2": gpt2, "llama": llama}


def token_ids(*shape: int) -> Tensor:
    """Random token numbers."""
    return torch.randint(0, VOCABULARY, shape)


def capture_transformer(model: nn.Module, *shape: int) -> qc.Program:
    """Capture a model that takes token numbers, at a batch × sequence shape."""
    return qc.capture_model(model, (token_ids(*(shape or (2, 16))),))


def outputs(x: Any) -> list[Tensor]:
    """The tensors of a model's output, whatever containers it uses, in flat order."""
    return [leaf.detach() for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def randomize_adapters(program: qc.Program, size: float = 0.1, seed: int = 7) -> qc.Program:
    """Give every adapter random values of about `size`, but A, as training would; returns it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in program.named_adapter_parameters():
            if name.rpartition(".")[2] in TRAINED_NAMES[1:]:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values * size)
    return program


def adapted(
    model: nn.Module,
    args: tuple[Any, ...],
    quant: qc.QuantSpec | None = None,
    adapter: qc.AdapterSpec | None = None,
    *,
    size: float = 0.1,
) -> qc.Program:
    """Capture, quantize, insert adapters and give them values."""
    program = qc.quantize_groups(qc.capture_model(model, args), quant or qc.QuantSpec())
    return randomize_adapters(
        qc.insert_adapters(program, adapter or qc.AdapterSpec(rank=4)), size=size
    )


def worst(first: Any, second: Any) -> float:
    """Largest absolute difference between the tensors of two outputs."""
    a, b = outputs(first), outputs(second)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape, f"{list(x.shape)} and {list(y.shape)}"
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


def scale_of(x: Any) -> float:
    """Largest absolute value of an output, by which tolerances are scaled."""
    return max(float(t.double().abs().max()) for t in outputs(x))


def assert_close(actual: Any, expected: Any, *, relative: float) -> None:
    """Assert that two outputs differ by at most `relative` × the scale of the expected one."""
    found, bound = worst(actual, expected), relative * scale_of(expected)
    assert found <= bound, f"differ by {found:.3g}, more than {bound:.3g}"

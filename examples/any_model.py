"""The same functions on three architectures, built from config: an MLP, a BERT and a GPT-2.

Each is captured, quantized, given adapters, trained for a few steps, folded and exported, and every
step is verified in torch and in ONNX Runtime. Nothing is specific to an architecture; GPT-2's
layers are Conv1D, which store their weights transposed.

    python examples/any_model.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import qalora_compile as qc

TOLERANCE = qc.Tolerance(max_rel=1e-4, rounding=True)


def build_models() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Model and example inputs by name."""
    ids = torch.randint(0, 100, (2, 12))
    bert = BertConfig(
        vocab_size=100,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
    )
    gpt2 = GPT2Config(
        vocab_size=100, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    gpt2.use_cache = False
    mlp = nn.Sequential(nn.Linear(50, 64), nn.GELU(), nn.Linear(64, 10))
    return {
        "MLP": (mlp, {"input": torch.randn(4, 50)}),
        "BERT": (BertForSequenceClassification(bert), {"input_ids": ids}),
        "GPT-2": (GPT2LMHeadModel(gpt2), {"input_ids": ids}),
    }


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    leaf = pytree.tree_leaves(output)[0]
    assert isinstance(leaf, Tensor)
    return leaf


def train_a_little(program: qc.Program, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Pull the outputs towards 1; gives the loss before and after."""
    optimizer = torch.optim.AdamW(program.adapter_parameters(), lr=5e-3)
    losses = []
    for _ in range(10):
        loss = (first_tensor(program(**inputs)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main() -> None:
    """Take every model through every step."""
    torch.manual_seed(0)
    for name, (model, inputs) in build_models().items():
        program = qc.capture_model(model.eval(), (), inputs)
        program = qc.quantize_groups(program, qc.QuantSpec(bits=4, group_size=20))
        program = qc.insert_adapters(program, qc.AdapterSpec(rank=4))
        before, after = train_a_little(program, inputs)
        folded = qc.fold_adapters(program)
        qc.verify_equivalence(program, folded, [inputs], TOLERANCE).check()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            qc.export_model(folded, path)
            report = qc.verify_equivalence(folded, path, [inputs], TOLERANCE).check()
        counts = ", ".join(f"{n} {decision}" for decision, n in folded.plan.counts().items())
        print(f"{name}: {counts}; loss {before:.3f} → {after:.3f}, ONNX {report.max_abs:.0e} off")
        for site in folded.plan:
            print(f"  {site.name:45} {site.kind:9} {site.decision:8} {site.reason}")


if __name__ == "__main__":
    main()

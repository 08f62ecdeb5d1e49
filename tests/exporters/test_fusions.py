"""Fusions of programs in memory are those of the command line: any batch, cache or none, loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.verify import compare_nodes, sample_inputs
from qalora_compile.verify.numeric.decoding_calls import decoding_calls
from tests.models import gpt2, llama, slow, token_ids

FUSED = {
    "standard": {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2},
    "ort": {
        "SkipSimplifiedLayerNormalization": 4,
        "RotaryEmbedding": 4,
        "MultiHeadAttention": 2,
    },
}
OF_GPT2 = {"standard": {"Attention": 2}, "ort": {"MultiHeadAttention": 2}}
TOLERANCE = qc.Tolerance(max_rel=1e-4)


def captured(build: Callable[[], Any], way: str) -> qc.Program:
    torch.manual_seed(0)
    model, ids = build(), token_ids(2, 8)
    if way == "cache":
        return qc.quantize_groups(capture_causal_lm(model))
    inputs = {"input_ids": ids} | (
        {"attention_mask": torch.ones_like(ids)} if way == "mask" else {}
    )
    return qc.quantize_groups(qc.capture_model(model, (), inputs))


CASES = [
    (llama, "cache", True),
    *slow(
        (llama, "tokens", False),
        (llama, "tokens", True),
        (llama, "mask", False),
        (llama, "mask", True),
    ),
    *slow((gpt2, "tokens", True), (gpt2, "cache", True), (gpt2, "mask", False)),
]


@pytest.mark.parametrize("fusion", ["standard", *slow("ort")])
@pytest.mark.parametrize(("build", "way", "loaded"), CASES)
def test_fusions_fire_and_are_right(
    build: Callable[[], Any], way: str, loaded: bool, fusion: str, tmp_path: Path
) -> None:
    program = captured(build, way)
    used, path = program, tmp_path / "model.onnx"
    if loaded:
        program.save(tmp_path / "program")
        used = qc.Program.load(tmp_path / "program")
    report = qc.export_model(used, path, qc.ExportSpec(fusion=fusion))
    assert report.notes == ()
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    kinds["Attention"] += kinds.pop("CachedAttention", 0)  # target `ort`, where there is a cache
    wanted = (OF_GPT2 if build is gpt2 else FUSED)[fusion]
    assert {kind: kinds[kind] for kind in wanted} == wanted
    assert kinds["Softmax"] == 0
    if way == "cache":
        compare_nodes(program, path, decoding_calls(program), levels=("all",)).check()
    else:  # batch 1 and 3, of lengths other than the captured one
        assert qc.verify_equivalence(program, path, sample_inputs(program, 2), TOLERANCE).passed


class Odd(nn.Module):
    """A norm over the wrong axis, a rotation by tables of unknown origin, and causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight = nn.Linear(32, 32), nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[B, S, 32]`, and tables `[S, 8]`."""
        x = self.fc(x)
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        rotated = torch.cat([-heads[..., 4:], heads[..., :4]], -1)
        heads = heads * cos + rotated * sin
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return y.transpose(1, 2).flatten(-2)


def test_what_is_left_is_named_with_a_reason(tmp_path: Path) -> None:
    x, tables = torch.randn(2, 6, 32), (torch.randn(6, 8), torch.randn(6, 8))
    program = qc.quantize_groups(qc.capture_model(Odd().eval(), (x, *tables)))
    spec = qc.ExportSpec(fusion="standard")
    notes = qc.export_model(program, tmp_path / "model.onnx", spec).notes
    norm, rotary, attention = sorted(notes, key=lambda n: ("norm" not in n, "rotary" not in n))
    assert "fuse-rms-norm left rsqrt (1 in all): the mean is not over the last axis" in norm
    assert "fuse-rotary left cat" in rotary and "cos and sin are not seen" in rotary
    assert "fuse-attention left scaled_dot_product_attention" in attention
    assert "causal from the first key" in attention
    report = qc.verify_equivalence(
        program, tmp_path / "model.onnx", sample_inputs(program, 2), TOLERANCE
    )
    assert report.passed


class OddNorms(nn.Module):
    """Three norms over the wrong axis, and one that drops its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight = nn.Linear(32, 32), nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, 32]`."""
        x = self.fc(x)
        for _ in range(3):
            x = self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def test_what_is_left_for_one_reason_is_counted(tmp_path: Path) -> None:
    program = qc.quantize_groups(qc.capture_model(OddNorms().eval(), (torch.randn(2, 6, 32),)))
    spec = qc.ExportSpec(fusion="standard")
    notes = qc.export_model(program, tmp_path / "model.onnx", spec).notes
    assert notes == (
        "not fused: fuse-rms-norm left rsqrt (3 in all): "
        "the mean is not over the last axis (dim is [1]), at mean",
        "not fused: fuse-rms-norm left rsqrt_3 (1 in all): "
        "no product with a weight reads it, only the output, at mul_6",
    )


def test_a_program_without_anything_to_fuse_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    program = qc.quantize_groups(qc.capture_model(model, (torch.randn(2, 32),)))
    for fusion, count in (("standard", 1), ("none", 0)):
        path = tmp_path / f"{fusion}.onnx"
        notes = qc.export_model(program, path, qc.ExportSpec(fusion=fusion)).notes
        assert len(notes) == count
        assert not count or "found nothing that is written out" in notes[0]

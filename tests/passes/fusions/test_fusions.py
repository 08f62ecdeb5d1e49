"""The fusing passes together: golden graphs, equal numbers, nothing left to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.ir.spec import (
    ATTENTION,
    FUSED,
    MULTI_HEAD_ATTENTION,
    RMS_NORM,
    ROTARY_EMBEDDING,
    SKIP_RMS_NORM,
)
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.fusions.fuse_attention import FuseAttention
from qalora_compile.passes.fusions.fuse_multi_head import FuseMultiHead
from qalora_compile.passes.fusions.fuse_rms_norm import FuseRmsNorm
from qalora_compile.passes.fusions.fuse_rotary import FuseRotary
from qalora_compile.passes.fusions.fuse_skip_norm import FuseSkipNorm
from tests.models import gpt2, llama, worst

Golden = Callable[[str, str], None]


def counts(program: qc.Program) -> tuple[int, int, int]:
    """Norms, rotary embeddings, attentions."""
    targets = [node.target for node in program.graph.nodes]
    return targets.count(RMS_NORM), targets.count(ROTARY_EMBEDDING), targets.count(ATTENTION)


@pytest.fixture(scope="module")
def cached() -> qc.Program:
    torch.manual_seed(0)
    return capture_causal_lm(llama())


def fuse(program: qc.Program) -> qc.Program:
    return Pipeline([FuseRmsNorm(), FuseRotary(), FuseAttention()])(program).program


def fuse_further(program: qc.Program) -> qc.Program:
    return Pipeline([FuseSkipNorm(), FuseMultiHead()])(fuse(program)).program


def test_golden(cached: qc.Program, golden: Golden) -> None:
    text = str(fuse(cached))
    golden("fusions", text[: text.index("tensors")])


def test_a_decoder_layer_is_as_small_as_its_operators(cached: qc.Program) -> None:
    program = fuse(cached)
    assert counts(program) == (5, 4, 2)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.scaled_dot_product_attention.default not in calls
    assert calls.count(torch.ops.aten.transpose.int) == 0
    assert calls.count(torch.ops.aten.cat.default) == 1  # the table of angles


def test_golden_of_the_runtimes_own_operators(cached: qc.Program, golden: Golden) -> None:
    text = str(fuse_further(cached))
    golden("fusions-ort", text[text.index("qalora.rms_norm") : text.index("tensors")])
    targets = [node.target for node in fuse_further(cached).graph.nodes]
    assert (targets.count(SKIP_RMS_NORM), targets.count(RMS_NORM)) == (4, 1)  # 1 with no sum
    assert (targets.count(MULTI_HEAD_ATTENTION), targets.count(ATTENTION)) == (2, 0)


def padded_call(program: qc.Program) -> dict[str, Any]:
    """Three tokens after five, two of which are padding in the first of two sequences."""
    keys = [leaf for leaf in program.signature.inputs if leaf.name.endswith(".key")]
    past = [
        {n: torch.randn(2, int(k.shape[1]), 5, int(k.shape[3])).double() for n in ("key", "value")}
        for k in keys
    ]
    mask = torch.ones(2, 8).long()
    mask[0, :2] = 0
    return {
        "input_ids": torch.randint(0, 100, (2, 3)),
        "attention_mask": mask,
        "position_ids": torch.arange(5, 8).repeat(2, 1),
        "past_key_values": past,
    }


@pytest.mark.parametrize("passes", [fuse, fuse_further])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_fused_models_compute_the_same(
    build: Callable[[], nn.Module], passes: Callable[[qc.Program], qc.Program]
) -> None:
    program = capture_causal_lm(build().double())
    fused = passes(program)
    assert any(node.target in FUSED for node in fused.graph.nodes)
    call = padded_call(program)
    assert worst(fused(**call), program(**call)) < 1e-12


def test_fusing_twice_changes_nothing_more(cached: qc.Program) -> None:
    once = fuse_further(cached)
    for step in (FuseRmsNorm(), FuseRotary(), FuseAttention(), FuseSkipNorm(), FuseMultiHead()):
        assert not step(once).modified

"""The fusing passes: what they find, what they leave, what stays equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

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
from qalora_compile.passes.fusions import fuse_multi_head
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


class Norm(nn.Module):
    """A root-mean-square norm in one of the ways that models write it."""

    def __init__(self, width: int, way: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.way, self.eps = way, eps

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        mean = x.pow(2).mean(-1, keepdim=True) + self.eps
        if self.way == "gemma":
            return x * torch.pow(mean, -0.5) * (1.0 + self.weight)
        if self.way == "other axis":
            mean = x.pow(2).mean(1, keepdim=True) + self.eps
        if self.way == "cubed":
            mean = x.pow(3).mean(-1, keepdim=True).abs() + self.eps
        normed = x * torch.rsqrt(mean)
        if self.way == "unweighted":
            return normed
        return self.weight * (normed if self.way != "other x" else (x + 1) * torch.rsqrt(mean))


@given(width=st.integers(1, 40), way=st.sampled_from(["llama", "gemma"]))
@settings(max_examples=10)
def test_norms_of_models_are_found(width: int, way: str) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    program = qc.capture_model(Norm(width, way).double().eval(), (x,))
    result = FuseRmsNorm()(program)
    assert counts(result.program) == (1, 0, 0)
    assert len(result.changes) == 1
    assert worst(result.program(x), program(x)) < 1e-13


@pytest.mark.parametrize("way", ["other axis", "cubed", "unweighted", "other x"])
def test_what_looks_like_a_norm_is_left_alone(way: str) -> None:
    x = torch.randn(2, 3, 8)
    result = FuseRmsNorm()(qc.capture_model(Norm(8, way).eval(), (x,)))
    assert counts(result.program) == (0, 0, 0)
    assert not result.modified


class Rotated(nn.Module):
    """A rotary embedding of heads, with one thing that may be odd."""

    def __init__(self, odd: str = "", width: int = 8, part: int = 8) -> None:
        super().__init__()
        self.odd, self.width, self.part = odd, width, part
        self.frequency = nn.Buffer(torch.rand(part // 2))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `[B, S, H · D]`."""
        angle = positions[..., None] * self.frequency
        table = torch.cat([angle, angle if self.odd != "halves differ" else 2 * angle], -1)
        cos, sin = table.cos().unsqueeze(1), table.sin().unsqueeze(1)
        heads = x.unflatten(-1, (-1, self.width)).transpose(1, 2)
        whole, heads = heads, heads[..., : self.part]
        half = self.part // 2
        first, second = heads[..., :half], heads[..., half:]
        turned = torch.cat([second if self.odd == "no minus" else -second, first], -1)
        if self.odd == "neighbours":
            even, uneven = heads[..., ::2], heads[..., 1::2]
            turned = torch.stack([-uneven, even], -1).flatten(-2)
        heads = heads * cos + turned * sin
        if self.part < self.width:
            heads = torch.cat([heads, whole[..., self.part :]], -1)
        return heads.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("part", [8, 4])
def test_rotary_embeddings_are_found(part: int) -> None:
    x, positions = torch.randn(2, 3, 16).double(), torch.arange(6.0).double().view(2, 3)
    program = qc.capture_model(Rotated(part=part).double().eval(), (x, positions))
    result = FuseRotary()(program)
    assert counts(result.program) == (0, 1, 0)
    assert worst(result.program(x, positions), program(x, positions)) < 1e-14


@pytest.mark.parametrize("odd", ["halves differ", "no minus", "neighbours"])
def test_other_rotations_are_left_alone(odd: str) -> None:
    x, positions = torch.randn(2, 3, 16), torch.arange(6.0).view(2, 3)
    program = qc.capture_model(Rotated(odd).eval(), (x, positions))
    assert not FuseRotary()(program).modified


class Attending(nn.Module):
    """Attention over itself, heads shared or not."""

    def __init__(self, shared: int = 1, **options: Any) -> None:
        super().__init__()
        self.shared, self.options = shared, options

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend with x as query, key and value."""
        q = x.unflatten(-1, (-1, 4)).transpose(1, 2)
        k = v = q[:, :: self.shared]
        if self.shared > 1:
            b, h, t, d = k.shape
            k = v = k[:, :, None].expand(b, h, self.shared, t, d).reshape(b, -1, t, d)
        y = functional.scaled_dot_product_attention(
            q, k, v, None if self.options else mask, **self.options
        )
        return y.transpose(1, 2).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("shared", [1, 2])
def test_attention_without_a_past_is_found(shared: int) -> None:
    x, mask = torch.randn(2, 5, 16).double(), torch.ones(5, 5).tril().bool()[None, None]
    program = qc.capture_model(Attending(shared).double().eval(), (x, mask))
    result = FuseAttention()(program)
    assert counts(result.program) == (0, 0, 1)
    assert worst(result.program(x, mask), program(x, mask)) < 1e-14


def test_attention_that_counts_from_the_first_key_is_left_alone() -> None:
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5).bool()
    program = qc.capture_model(Attending(is_causal=True).eval(), (x, mask))
    result = FuseAttention()(program)
    assert not result.modified
    assert "causal" in result.skips[0].why


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


def call_with_padding(program: qc.Program) -> dict[str, Any]:
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


@pytest.mark.parametrize("way", [fuse, fuse_further])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_fused_models_compute_the_same(
    build: Callable[[], nn.Module], way: Callable[[qc.Program], qc.Program]
) -> None:
    program = capture_causal_lm(build().double())
    fused = way(program)
    assert any(node.target in FUSED for node in fused.graph.nodes)
    call = call_with_padding(program)
    assert worst(fused(**call), program(**call)) < 1e-12


def test_a_planted_fault_in_the_groups_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture_causal_lm(llama().double())
    call = call_with_padding(program)
    monkeypatch.setattr(
        fuse_multi_head._Biases,
        "_numbers",
        lambda self, mask, dtype: self.graph.call_function(torch.ops.aten.to.dtype, (mask, dtype)),
    )
    assert worst(fuse_further(program)(**call), program(**call)) > 1e-3


class Summed(nn.Module):
    """A norm of a sum, with one thing that may be odd."""

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        self.odd, self.norm, self.layer = odd, Norm(8, "llama"), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + y, and the sum."""
        if self.odd == "broadcast":
            y = y[:, :1]
        total = torch.add(x, y, alpha=2) if self.odd == "factor" else x + y
        early = total.cos() if self.odd == "read before" else x
        if self.odd == "two axes":
            return self.norm(total.flatten(0, 1)), total
        return self.norm(total) + early, total


@pytest.mark.parametrize("odd", ["", "factor", "broadcast", "read before", "two axes"])
def test_norms_of_sums_are_found_where_they_fit(odd: str) -> None:
    x, y = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    program = FuseRmsNorm()(qc.capture_model(Summed(odd).double().eval(), (x, y))).program
    result = FuseSkipNorm()(program)
    targets = [node.target for node in result.program.graph.nodes]
    assert targets.count(SKIP_RMS_NORM) == (not odd)
    assert worst(result.program(x, y), program(x, y)) < 1e-13
    reasons = {
        "factor": ["a factor"],
        "broadcast": ["shapes of the summands"],
        "read before": ["before the norm"],
    }
    for skip, part in zip(result.skips, reasons.get(odd, []), strict=True):
        assert part in skip.why


def test_the_sum_of_a_layer_and_its_bias_keeps_its_name() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(32, 8), Norm(8, "llama")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x))

    x = torch.randn(2, 3, 32)
    program = qc.quantize_groups(qc.capture_model(Layer().eval(), (x,)))
    lowered = Pipeline.parse("legalize-ort-stock,fuse-rms-norm")(program).program
    (skip,) = FuseSkipNorm()(lowered).skips
    assert "output of a layer" in skip.why


class Biased(nn.Module):
    """Attention of four heads, two of keys, with a mask of some shape."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend with x as query, key and value."""
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        k = v = q[:, ::2]
        y = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return y.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("shape", [(5, 5), (4, 5, 5), (1, 1, 5, 5), (2, 4, 5, 5)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_any_shape_are_added(shape: tuple[int, ...], boolean: bool) -> None:
    x = torch.randn(2, 5, 16).double()
    mask: Tensor = torch.rand(shape) > 0.4 if boolean else torch.randn(shape).double()
    if boolean:
        mask[..., 0] = True
    program = qc.capture_model(Biased().eval(), (x, mask), dynamic_shapes={"x": None, "mask": None})
    result = FuseMultiHead()(FuseAttention()(program).program)
    targets = [node.target for node in result.program.graph.nodes]
    assert targets.count(MULTI_HEAD_ATTENTION) == 1
    assert worst(result.program(x, mask), program(x, mask)) < 1e-13


def test_a_mask_of_an_unknown_number_of_heads_is_left_alone() -> None:
    x, mask = torch.randn(2, 5, 16), torch.ones(2, 4, 5, 5).bool()
    program = FuseAttention()(qc.capture_model(Biased().eval(), (x, mask))).program
    result = FuseMultiHead()(program)
    assert not result.modified
    assert "heads" in result.skips[0].why


def test_fusing_twice_changes_nothing_more(cached: qc.Program) -> None:
    once = fuse_further(cached)
    for step in (FuseRmsNorm(), FuseRotary(), FuseAttention(), FuseSkipNorm(), FuseMultiHead()):
        assert not step(once).modified

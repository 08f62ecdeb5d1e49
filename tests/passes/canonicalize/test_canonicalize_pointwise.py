"""canonicalize-pointwise: 1×1 convolutions become linear maps, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.ir.site_plan import KEEP, QUANTIZE
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize import canonicalize_pointwise as module
from qalora_compile.passes.canonicalize.canonicalize_pointwise import CanonicalizePointwise
from tests.models import adapted, scale_of, worst

Golden = Callable[[str, str], None]
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LINEAR = torch.ops.aten.linear.default


def canonical(model: nn.Module, x: Tensor) -> tuple[qc.Program, int]:
    """The canonical program of a model, and how many convolutions were rewritten."""
    result = CanonicalizePointwise()(qc.capture_model(model.eval(), (x,)))
    return result.program, len(result.changes)


def count(program: qc.Program, target: object) -> int:
    return sum(node.target is target for node in program.graph.nodes)


def test_golden(golden: Golden) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3))
    program, _ = canonical(model, torch.randn(2, 4, 5, 7))
    golden("canonicalize-pointwise", str(program))


@settings(max_examples=10, deadline=None)
@given(
    rank=st.sampled_from([1, 2, 3]),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(2, 4),
    bias=st.booleans(),
    batched=st.booleans(),
)
def test_the_function_stays(
    rank: int, channels: tuple[int, int], size: int, bias: bool, batched: bool
) -> None:
    kind: Any = CONVOLUTIONS[rank]
    model = nn.Sequential(kind(*channels, 1, bias=bias).double())
    shape = [*([2] if batched else []), channels[0], *[size] * rank]
    x = torch.randn(shape, dtype=torch.float64)
    program, changes = canonical(model, x)
    assert changes == count(program, LINEAR) == 1
    assert worst(program(x), model(x)) < 1e-12


OTHERS: dict[str, tuple[nn.Module, str]] = {
    "kernel": (nn.Conv2d(4, 8, 3), "conv2d with a 3×3 kernel"),
    "flat kernel": (nn.Conv2d(4, 8, (1, 3)), "conv2d with a 1×3 kernel"),
    "stride": (nn.Conv2d(4, 8, 1, stride=2), "1×1 conv2d with stride"),
    "padding": (nn.Conv2d(4, 8, 1, padding=1), "1×1 conv2d with padding"),
    "groups": (nn.Conv2d(4, 8, 1, groups=2), "1×1 conv2d with groups 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_stay_and_the_plan_says_why(name: str) -> None:
    convolution, reason = OTHERS[name]
    x = torch.randn(2, 4, 6, 6)
    program, changes = canonical(nn.Sequential(convolution, nn.Conv2d(8, 4, 1)), x)
    assert changes == 1
    first, second = AnnotateLinears()(program).program.plan
    assert first.decision == KEEP and reason in first.reason
    assert (second.name, second.kind, second.decision) == ("1", "pointwise", QUANTIZE)


def test_without_the_pass_the_plan_names_it() -> None:
    program = qc.capture_model(nn.Sequential(nn.Conv1d(4, 8, 1)), (torch.randn(2, 4, 6),))
    (site,) = AnnotateLinears()(program).program.plan
    assert site.decision == KEEP and "canonicalize-pointwise" in site.reason


def test_a_second_run_changes_nothing() -> None:
    x = torch.randn(2, 4, 5, 7)
    once, _ = canonical(nn.Sequential(nn.Conv2d(4, 6, 1)), x)
    twice = CanonicalizePointwise()(once)
    assert not twice.changes and str(twice.program) == str(once)


def test_a_convolution_used_twice_is_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(torch.tanh(self.conv(x)))
            return y

    torch.manual_seed(0)
    x = torch.randn(2, 16, 5)
    program = adapted(Twice(), (x,), qc.QuantSpec(group_size=8))
    assert [s.path for s in program.plan.to_quantize()] == ["conv", "conv"]
    assert worst(program(x), qc.fold_adapters(program)(x)) <= 1e-5 * scale_of(program(x))


def test_quantized_programs_are_refused() -> None:
    x = torch.randn(2, 4, 5)
    program = qc.quantize_groups(qc.capture_model(nn.Sequential(nn.Conv1d(4, 6, 1)), (x,)))
    with pytest.raises(PreconditionError, match="quantized"):
        CanonicalizePointwise()(program)


def test_a_convolution_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rewrite", lambda graph, node, program: None)
    with pytest.raises(PostconditionError, match="is left"):
        canonical(nn.Sequential(nn.Conv1d(4, 6, 1)), torch.randn(2, 4, 5))


def test_the_wrong_axis_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = module._rewrite

    def planted(graph: fx.Graph, node: fx.Node, program: qc.Program) -> None:
        rewrite(graph, node, program)
        moved = next(n for n in graph.nodes if n.target is torch.ops.aten.movedim.int)
        moved.args = (moved.args[0], -1, -1)

    model, x = nn.Sequential(nn.Conv1d(5, 5, 1)), torch.randn(2, 5, 5)
    monkeypatch.setattr(module, "_rewrite", planted)
    program, _ = canonical(model, x)
    assert worst(program(x), model(x)) > 0.1 * scale_of(model(x))

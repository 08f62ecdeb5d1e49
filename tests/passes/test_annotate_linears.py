"""annotate-linears: every weight gets a row, a decision and a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.errors import InternalError, UserInputError
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.pattern import LinearMap, match_linear
from qalora_compile.ir.site_plan import KEEP, QUANTIZE
from qalora_compile.ir.stages import ANNOTATED
from qalora_compile.passes import annotate_linears as pass_module
from qalora_compile.passes import quantize_groups as quantize_module
from qalora_compile.passes.analysis import find_weight_uses
from qalora_compile.passes.analysis.find_weight_uses import owner_path
from qalora_compile.passes.annotate_linears import AnnotateLinears
from tests.models import MLP, TRANSFORMERS, SquareConv1D, TiedHead, UsedTwice, token_ids, worst

Golden = Callable[[str, str], None]


def annotated(model: nn.Module, x: Tensor, **options: object) -> qc.Program:
    program = qc.capture_model(model.eval(), (x,))
    return AnnotateLinears(**options)(program).program  # type: ignore[arg-type]


def test_golden(golden: Golden) -> None:
    golden("annotate-linears", str(annotated(MLP(16, 24, 8), torch.randn(2, 16))))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_weight_has_a_row_with_a_reason(name: str) -> None:
    ids = token_ids(2, 16)
    program = annotated(TRANSFORMERS[name](), ids)
    weights = {
        n for n, t in program.tensors().items() if isinstance(t, nn.Parameter) and t.dim() > 1
    }
    assert {site.weight for site in program.plan} == weights
    assert all(site.reason for site in program.plan)
    assert len({site.name for site in program.plan}) == len(program.plan)
    assert program.stage == ANNOTATED


def test_the_function_does_not_change() -> None:
    model, x = MLP(16, 24, 8).double(), torch.randn(3, 16, dtype=torch.float64)
    assert worst(annotated(model, x)(x), model(x)) == 0.0


def test_ties_are_kept_and_can_be_forced() -> None:
    model, ids = TiedHead(), token_ids(2, 8) % 48
    kept = annotated(model, ids)
    assert kept.plan["lm_head"].decision == KEEP
    assert "tied to embed" in kept.plan["lm_head"].reason
    assert annotated(model, ids, targets=("lm_head",)).plan["lm_head"].decision == QUANTIZE


def test_uses_of_one_weight_share_a_storage() -> None:
    plan = annotated(UsedTwice(), torch.randn(2, 32)).plan
    assert [s.name for s in plan] == ["shared", "shared@2", "head"]
    assert plan["shared"].storage == plan["shared@2"].storage != plan["head"].storage


class Odd(nn.Module):
    """Weights that are used otherwise than x Wᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 4))
        self.plain = nn.Parameter(torch.randn(6, 5))
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.left @ x) @ self.plain
        y = torch.addmm(torch.zeros(5), y, self.plain.t() @ self.plain, alpha=2)
        return self.conv(y[:, None])


def test_other_uses_are_kept_and_named_by_their_operator() -> None:
    plan = annotated(Odd(), torch.randn(4, 6)).plan
    kinds = {(s.weight, s.kind): s.decision for s in plan}
    assert kinds["left", "matmul"] == KEEP, "a weight on the left is no x W"
    assert kinds["conv.weight", "conv1d"] == KEEP
    plain = [s for s in plan if s.weight == "plain"]
    assert [s.name for s in plain] == ["plain", "plain@2"], "one row for each node that reads it"
    assert {s.decision for s in plain} == {KEEP}, "it is also multiplied with itself"
    assert any("tied to plain" in s.reason for s in plain)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.1", {"layers.1"}),
        ("1", {"layers.1"}),
        ("layers.*", {"layers.0", "layers.1", "layers.2"}),
        ("re:[02]$", {"layers.0", "layers.2"}),
        ("all-linear", {"layers.0", "layers.1", "layers.2"}),
    ],
)
def test_targets_select(pattern: str, expected: set[str]) -> None:
    targets = pattern if pattern == "all-linear" else (pattern,)
    plan = annotated(MLP(16, 8, 8, 8), torch.randn(2, 16), targets=targets).plan
    assert {s.name for s in plan if s.decision == QUANTIZE} == expected
    excluded = annotated(MLP(16, 8, 8, 8), torch.randn(2, 16), exclude=("layers.1",)).plan
    assert excluded["layers.1"].reason == "excluded"


@given(st.sets(st.sampled_from(["layers.0", "layers.1", "layers.2"]), min_size=1))
def test_exactly_the_named_sites_are_quantized(names: set[str]) -> None:
    program = qc.capture_model(_THREE, (_X,))
    plan = AnnotateLinears(targets=tuple(sorted(names)))(program).program.plan
    assert {s.name for s in plan if s.decision == QUANTIZE} == names


_THREE, _X = MLP(8, 8, 8, 8).eval(), torch.zeros(2, 8)


@pytest.mark.parametrize("option", ["targets", "exclude"])
def test_a_pattern_that_matches_nothing_lists_near_names(option: str) -> None:
    with pytest.raises(UserInputError, match="matches no linear layer") as caught:
        annotated(MLP(16, 8, 8), torch.randn(2, 16), **{option: ("layer.1",)})
    assert caught.value.where == option
    assert "layers.1" in str(caught.value.hint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = MLP(16, 8, 8)
    with torch.no_grad():
        model.get_parameter("layers.1.weight")[3, 3] = bad
    with pytest.raises(UserInputError, match=r"layers\.1\.weight holds NaN or infinite"):
        annotated(model, torch.randn(2, 16))


def test_an_invalid_regular_expression_is_refused() -> None:
    with pytest.raises(UserInputError, match="not a regular expression"):
        annotated(MLP(16, 8), torch.randn(2, 16), targets=("re:(",))


def test_a_layer_read_the_wrong_way_round_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = SquareConv1D(64).eval(), torch.randn(3, 64)
    right = qc.quantize_groups(qc.capture_model(model, (x,)))
    real = match_linear

    def transposed(node: fx.Node) -> LinearMap | None:
        found = real(node)
        return found and dataclasses.replace(found, flipped=not found.flipped)

    monkeypatch.setattr(find_weight_uses, "match_linear", transposed)
    monkeypatch.setattr(quantize_module, "match_linear", transposed)
    wrong = qc.quantize_groups(qc.capture_model(model, (x,)))
    report = qc.verify_equivalence(right, wrong, [(x,)], qc.Tolerance(max_rel=0.05))
    assert not report.passed
    assert report.first_divergence == "c_proj"


def test_a_site_marked_on_another_node_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "mark_site", lambda node, name: None)
    with pytest.raises(InternalError, match="no node computes the site"):
        annotated(MLP(16, 8, 8), torch.randn(2, 16))


def test_marks_follow_the_plan_and_the_input_has_none() -> None:
    program = qc.capture_model(MLP(16, 8, 8).eval(), (torch.randn(2, 16),))
    after = AnnotateLinears()(program).program
    assert [s for s in map(site_of, after.graph.nodes) if s] == ["layers.0", "layers.1"]
    assert not any(map(site_of, program.graph.nodes))


@pytest.mark.parametrize(
    ("weight", "path"),
    [("a.b.weight", "a.b"), ("mha.in_proj_weight", "mha.in_proj"), ("a.W", "a.W_quantized")],
)
def test_where_quantized_tensors_are_stored(weight: str, path: str) -> None:
    assert owner_path(weight) == path


def test_excluding_outweighs_naming() -> None:
    plan = annotated(
        MLP(16, 8, 8), torch.randn(2, 16), targets=("layers.*",), exclude=("layers.1",)
    ).plan
    assert {s.name: (s.decision, s.reason) for s in plan} == {
        "layers.0": (QUANTIZE, "named in targets"),
        "layers.1": (KEEP, "excluded"),
    }


def test_every_use_of_a_shared_weight_gets_the_same_decision() -> None:
    x = torch.randn(2, 32)
    for options in ({"targets": ("shared",)}, {"exclude": ("head",)}):
        plan = annotated(UsedTwice(), x, **options).plan
        assert {s.name for s in plan if s.decision == QUANTIZE} == {"shared", "shared@2"}
    assert annotated(UsedTwice(), x, exclude=("shared",)).plan["shared@2"].reason == "excluded"


def test_annotating_again_decides_anew() -> None:
    x = torch.randn(2, 16)
    once = annotated(MLP(16, 8, 8), x, targets=("layers.0",))
    again = AnnotateLinears(targets=("layers.1",))(once).program
    assert [s.name for s in again.plan if s.decision == QUANTIZE] == ["layers.1"]
    fresh = annotated(MLP(16, 8, 8), x, targets=("layers.1",))
    assert again.plan == fresh.plan
    assert len(again.history) == 2


def test_rows_describe_the_weight_as_it_is_stored() -> None:
    row = annotated(SquareConv1D(64), torch.randn(2, 64)).plan["c_proj"]
    assert (row.kind, row.transposed, row.k, row.n, row.weight) == (
        "addmm",
        True,
        64,
        64,
        "c_proj.weight",
    )
    row = annotated(MLP(16, 8), torch.randn(2, 16).double().float()).plan["layers.0"]
    assert (row.kind, row.transposed, row.k, row.n, row.dtype) == (
        "linear",
        False,
        16,
        8,
        "float32",
    )


def test_the_result_lists_each_row_once() -> None:
    ids = token_ids(2, 8) % 48
    result = AnnotateLinears()(qc.capture_model(TiedHead().eval(), (ids,)))
    assert [c.path for c in result.changes] == ["mid"]
    assert {c.path for c in result.skips} == {"embed", "lm_head"}
    assert all(c.why for c in (*result.changes, *result.skips))


def test_the_models_weights_are_the_programs_weights() -> None:
    model, x = MLP(16, 8, 8).eval(), torch.randn(2, 16)
    model.layers[0].weight.requires_grad_(False)
    program = annotated(model, x)
    for name, parameter in model.named_parameters():
        stored = program.tensors()[name]
        assert stored.data_ptr() == parameter.data_ptr()
        assert parameter.requires_grad == (name != "layers.0.weight")

"""quantize-groups: packed codes in place of weights, once a storage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.config import QuantSpec
from qalora_compile.errors import (
    InternalError,
    PostconditionError,
    PreconditionError,
    UserInputError,
)
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.pattern import match_linear
from qalora_compile.passes import quantize_groups as pass_module
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.quantizers import QuantizedWeight
from qalora_compile.quantizers.minmax import quantize_minmax
from tests.models import (
    MLP,
    OneLinear,
    SquareConv1D,
    TiedHead,
    UsedTwice,
    assert_close,
    bert,
    gpt2,
    randomize_adapters,
    worst,
)

Golden = Callable[[str, str], None]


def quantized(model: nn.Module, x: Tensor, **options: int) -> qc.Program:
    return qc.quantize_groups(qc.capture_model(model.eval(), (x,)), QuantSpec(**options))  # type: ignore[arg-type]


def test_golden(golden: Golden) -> None:
    golden("quantize-groups", str(quantized(MLP(16, 24, 8), torch.randn(2, 16), group_size=8)))


def dequantized(model: MLP, spec: QuantSpec) -> MLP:
    """The eager model with its weights replaced by what the quantizer makes of them."""
    replaced = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in replaced.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(quantize_minmax(parameter, spec).dequantize())
    return replaced


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.integers(1, 40),
    k=st.integers(1, 33),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_the_program_is_the_model_with_dequantized_weights(
    bits: int, group: int, k: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = MLP(k, 12, 5).double(), torch.randn(3, k, dtype=torch.float64)
    spec = QuantSpec(bits=bits, group_size=group)
    program = quantized(model, x, bits=bits, group_size=group)
    assert_close(program(x), dequantized(model, spec)(x), relative=1e-12)


def test_a_square_conv1d_is_read_the_right_way_round() -> None:
    model, x = SquareConv1D(64), torch.randn(3, 64)
    assert_close(quantized(model, x, bits=8)(x), model(x), relative=0.02)


def test_a_missed_transpose_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = SquareConv1D(64), torch.randn(3, 64)
    right = quantized(model, x, bits=8)

    def transposed(weight: Tensor, spec: QuantSpec, _: object) -> QuantizedWeight:
        return QuantizedWeight(quantize_minmax(weight.t(), spec))

    monkeypatch.setattr(pass_module, "get_quantizer", lambda method: transposed)
    wrong = quantized(model, x, bits=8)
    tolerance = qc.Tolerance(max_rel=0.05)
    assert not qc.verify_equivalence(right, wrong, [(x,)], tolerance).passed


def test_a_dropped_tail_group_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(weight: Tensor, spec: QuantSpec, _: object) -> QuantizedWeight:
        full = quantize_minmax(weight, spec)
        scale, offset = full.scale[:, :-1], full.offset[:, :-1]
        return QuantizedWeight(GroupAffine(full.codes, scale, offset, 4, spec.group))

    monkeypatch.setattr(pass_module, "get_quantizer", lambda method: short)
    with pytest.raises(UserInputError, match="scale is"):
        quantized(MLP(20, 4), torch.randn(2, 20), group_size=8)


def test_a_bias_added_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16)
    right = quantized(OneLinear(16, 4), x)
    name = "fc.bias"
    twice = nn.Parameter(right.tensors()[name] * 2, requires_grad=False)
    wrong = right.evolve(graph=right.copy_graph(), tensors=right.tensors() | {name: twice})
    report = qc.verify_equivalence(right, wrong, [(x,)], qc.Tolerance(max_rel=1e-3))
    assert not report.passed
    assert report.first_divergence == "fc"


def test_a_weight_used_twice_is_stored_once() -> None:
    program = quantized(UsedTwice(), torch.randn(2, 32))
    assert sorted(n for n in program.tensors() if n.endswith("qweight")) == [
        "head.qweight",
        "shared.qweight",
    ]
    assert not any(n.endswith(".weight") for n in program.tensors()), "no float copy is left"


def test_the_users_model_is_left_alone() -> None:
    model = bert()
    before = {n: p.clone() for n, p in model.named_parameters()}
    ids = torch.randint(0, 128, (2, 8))
    program = quantized(model, ids)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])
    assert not any(p.requires_grad for p in program.module.parameters())


def test_half_precision_weights_are_quantized_from_their_values() -> None:
    model, x = MLP(32, 8).to(torch.bfloat16), torch.randn(2, 32).to(torch.bfloat16)
    program = quantized(model, x, bits=8)
    assert program.tensors()["layers.0.scale"].dtype == torch.float32
    assert program(x).dtype == torch.bfloat16
    expected = model.float()(x.float())
    assert_close(program(x).float(), expected, relative=0.02)


def test_a_model_without_a_linear_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    with pytest.raises(UserInputError, match="no linear layer to quantize"):
        quantized(model, torch.randn(2, 1, 8))


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"bits": 0}, {"group_size": 0}, {"group_size": -1}]
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserInputError):
        QuantSpec(**options)  # type: ignore[arg-type]


def test_quantizing_twice_is_refused() -> None:
    program = quantized(MLP(16, 8), torch.randn(2, 16))
    with pytest.raises(PreconditionError, match="stage"):
        qc.quantize_groups(program)


def test_a_quantizer_that_fails_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Tensor, spec: QuantSpec, _: object) -> QuantizedWeight:
        raise ZeroDivisionError

    monkeypatch.setattr(pass_module, "get_quantizer", lambda method: broken)
    with pytest.raises(InternalError, match="quantize-groups failed"):
        quantized(MLP(16, 8), torch.randn(2, 16))


def test_addmm_sites_of_gpt2_are_quantized() -> None:
    model, ids = gpt2(), torch.randint(0, 128, (2, 8))
    program = quantized(model, ids, bits=8)
    assert {s.kind for s in program.plan.to_quantize()} == {"addmm"}
    with torch.no_grad():
        assert_close(program(ids), model(ids), relative=0.02)


def test_a_head_that_is_forced_leaves_its_embedding_in_float() -> None:
    model, ids = TiedHead().double().eval(), torch.arange(12).reshape(2, 6)
    spec = QuantSpec(bits=3, group_size=12)
    captured = qc.capture_model(model, (ids,))
    kept, forced = (
        qc.quantize_groups(captured, spec, targets=targets)
        for targets in ("all-linear", ("mid", "lm_head"))
    )
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.mid.weight.copy_(quantize_minmax(model.mid.weight, spec).dequantize())
        assert_close(kept(ids), expected(ids), relative=1e-12)
        head = quantize_minmax(model.lm_head.weight, spec).dequantize()
        expected.lm_head.weight = nn.Parameter(head)
        assert_close(forced(ids), expected(ids), relative=1e-12)
    assert forced.plan["lm_head"].reason == "named in targets"
    stored = forced.tensors()[forced.plan["embed"].weight]
    assert torch.equal(stored, model.embed.weight)


def test_a_forced_head_folds_and_lowers() -> None:
    model, ids = TiedHead().eval(), torch.arange(12).reshape(2, 6)
    program = qc.quantize_groups(qc.capture_model(model, (ids,)), targets=("lm_head",))
    program = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))
    folded = qc.fold_adapters(program)
    assert_close(folded(ids), program(ids), relative=1e-5)
    assert_close(lower(folded, qc.ExportSpec())(ids), program(ids), relative=1e-5)


def test_no_step_touches_the_users_model() -> None:
    model, x = MLP(20, 12, 12, 4).eval(), torch.randn(2, 20)
    model.layers[1].weight.requires_grad_(False)
    before = {n: (p, p.clone(), p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()}
    value = model(x)
    program = quantized(model, x, bits=3, group_size=7)
    program = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))
    program.train()
    program(x).square().sum().backward()
    with torch.no_grad():
        for parameter in program.adapter_parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    folded = qc.fold_adapters(program.eval())
    lower(folded, qc.ExportSpec())
    assert not model.training
    for name, parameter in model.named_parameters():
        first, copied, trainable, address = before[name]
        assert parameter is first
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, copied)
        assert parameter.requires_grad == trainable == (name != "layers.1.weight")
        assert parameter.grad is None
    assert worst(model(x), value) == 0.0
    assert worst(folded(x), value) > 0.0


def test_a_bias_kept_next_to_the_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias goes into the new operator; a pass that adds it once more doubles it."""
    x = torch.randn(3, 16)
    model = OneLinear(16, 4)
    right = quantized(model, x)
    real = move_site

    def add_again(old: fx.Node, new: fx.Node) -> None:
        graph = new.graph
        with graph.inserting_after(new):
            more = graph.call_function(torch.ops.aten.add.Tensor, (new, new.args[4]))
        real(old, new)
        old.replace_all_uses_with(more)

    monkeypatch.setattr(pass_module, "move_site", add_again)
    wrong = quantized(model, x)
    assert worst(wrong(x), right(x) + model.fc.bias) <= 1e-6, "the fault is the one that is meant"
    with pytest.raises(AssertionError, match="differ by"):
        assert_close(wrong(x), right(x), relative=1e-3)


def test_a_site_that_was_passed_over_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = match_linear

    def blind(node: fx.Node) -> object:
        return None if site_of(node) == "layers.1" else real(node)

    monkeypatch.setattr(pass_module, "match_linear", blind)
    with pytest.raises(PostconditionError, match="was not quantized") as caught:
        quantized(MLP(16, 8, 4), torch.randn(2, 16))
    assert caught.value.where == "layers.1"
    assert caught.value.pass_name == "quantize-groups"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [("scale", float("inf"), "scale holds"), ("offset", float("nan"), "offset holds")],
)
def test_a_quantizer_that_returns_nonsense_is_caught(
    part: str, value: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nonsense(weight: Tensor, spec: QuantSpec, _: object) -> QuantizedWeight:
        affine = quantize_minmax(weight, spec)
        getattr(affine, part)[0, 0] = value
        return QuantizedWeight(affine)

    monkeypatch.setattr(pass_module, "get_quantizer", lambda method: nonsense)
    with pytest.raises(UserInputError, match=message):
        quantized(MLP(16, 8), torch.randn(2, 16))


def test_nothing_to_quantize_says_why_each_layer_was_kept() -> None:
    program = qc.capture_model(MLP(16, 8, 4).eval(), (torch.randn(2, 16),))
    with pytest.raises(UserInputError, match="no linear layer to quantize") as caught:
        qc.quantize_groups(program, exclude=("layers.*",))
    assert caught.value.where == "layers.0: excluded; layers.1: excluded"
    assert caught.value.hint


def test_the_result_tells_what_was_done_and_what_was_left() -> None:
    ids = torch.arange(12).reshape(2, 6)
    annotated = AnnotateLinears()(qc.capture_model(TiedHead().eval(), (ids,))).program
    result = pass_module.QuantizeGroups(bits=3, group_size=8)(annotated)
    assert [(c.path, c.what, c.why) for c in result.changes] == [
        ("mid", "32×32 to 3 bits", "minmax")
    ]
    assert {c.path: c.what for c in result.skips} == {
        "embed": "kept in float",
        "lm_head": "kept in float",
    }
    row = result.program.plan["mid"]
    assert (row.bits, row.group_size, row.rank) == (3, 8, None)
    assert result.program.plan["lm_head"].bits is None

"""Adapters with integer zero-points: inserted, trained, folded, exported without corrections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import (
    InternalError,
    PostconditionError,
    PreconditionError,
    UnsupportedError,
    UserInputError,
)
from qalora_compile.ir.adapters import integer_zero as adapters
from qalora_compile.ir.ops import integer_zero_linear
from qalora_compile.ir.spec import INTEGER_ZERO_LINEAR, validate
from qalora_compile.passes import fold_adapters as fold_module
from qalora_compile.passes.insert_adapters import InsertAdapters
from tests.models import MLP, UsedTwice, bert, randomize_adapters, token_ids, worst

Golden = Callable[[str, str], None]
KINDS: dict[str, dict[str, Any]] = {
    "scale": {"kind": "scale"},
    "integer": {"zero_point": "integer"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantized(model: nn.Module, x: Tensor, group: int = 16, bits: int = 4) -> qc.Program:
    spec = qc.QuantSpec(bits=bits, group_size=group, zero_point="integer")
    return qc.quantize_groups(qc.capture_model(model.eval(), (x,)), spec)


def adapted(kind: str, model: nn.Module, x: Tensor, **options: Any) -> qc.Program:
    spec = qc.AdapterSpec(rank=2, alpha=2.0, **KINDS[kind])
    return randomize_adapters(qc.insert_adapters(quantized(model, x, **options), spec))


@every_kind
def test_golden(kind: str, golden: Golden) -> None:
    program = quantized(MLP(16, 24, 8), torch.randn(2, 16), group=8)
    inserted = InsertAdapters(rank=2, alpha=3.0, **KINDS[kind])(program).program
    golden(f"insert-adapters-{kind}", str(inserted))


@every_kind
def test_nothing_changes_at_the_start(kind: str) -> None:
    x = torch.randn(3, 20, dtype=torch.float64)
    before = quantized(MLP(20, 12, 5).double(), x)
    after = qc.insert_adapters(before, qc.AdapterSpec(rank=2, **KINDS[kind]))
    assert worst(after(x), before(x)) == 0.0
    assert all(site.integer_zero_point for site in after.plan)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    k=st.integers(2, 40),
    group=st.integers(1, 20),
    bits=st.sampled_from((2, 3, 4, 8)),
    half=st.sampled_from((torch.float32, torch.float64)),
)
@settings(max_examples=10, deadline=None)
def test_what_is_folded_is_what_was_trained_to_the_last_bit(
    kind: str, k: int, group: int, bits: int, half: torch.dtype
) -> None:
    x = torch.randn(4, k, dtype=half)
    program = adapted(kind, MLP(k, 12, 5).to(half), x, group=group, bits=bits)
    folded = qc.fold_adapters(program)
    assert worst(folded(x), program(x)) == 0.0
    assert not dict(folded.named_adapter_parameters())
    assert all(site.integer_zero_point and site.rank is None for site in folded.plan)
    assert qc.prove_equivalence(program, folded).passed


@every_kind
def test_a_group_of_one_weight_has_an_exact_zero_point_however_far_it_is_moved(kind: str) -> None:
    """Its scale is the weight, of 24 bits: times a zero-point of 8 bits it would be rounded."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    program = adapted(kind, MLP(12, 12, 5), x, group=11, bits=8)
    with torch.no_grad():
        for parameter in program.adapter_parameters():
            parameter.mul_(30.0)
    folded = qc.fold_adapters(program)
    assert worst(folded(x), program(x)) == 0.0
    assert qc.prove_equivalence(program, folded).passed


@every_kind
def test_training_lowers_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 32), torch.randn(64, 4)
    spec = qc.AdapterSpec(rank=4, **KINDS[kind])
    program = qc.insert_adapters(quantized(MLP(32, 32, 4), x), spec)
    optimizer = torch.optim.AdamW(program.adapter_parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (program(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every_kind
@pytest.mark.parametrize(
    ("target", "operators"),
    [
        ("ort", {"GroupQuantLinear"}),
        ("ort-stock", {"MatMulNBits"}),
        ("onnx", {"DequantizeLinear", "MatMul"}),
    ],
)
def test_exports_have_no_correction(
    kind: str, target: str, operators: set[str], tmp_path: Path
) -> None:
    x = torch.randn(5, 32)
    program = adapted(kind, MLP(32, 48, 16), x)
    folded, path = qc.fold_adapters(program), tmp_path / "model.onnx"
    qc.export_model(folded, path, qc.ExportSpec(target=target))
    found = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators <= found.keys() <= operators | {"Add", "Tanh"}
    assert found["Add"] <= 2, "the biases"
    assert all(found[name] == 2 for name in operators)
    for before in (program, folded):
        assert qc.verify_equivalence(before, path, [(x,)], qc.Tolerance(max_rel=2e-5)).passed
    assert qc.prove_equivalence(folded, path).passed


@every_kind
def test_a_transformer_and_a_weight_used_twice(kind: str, tmp_path: Path) -> None:
    for model, x in ((bert(), token_ids(2, 16)), (UsedTwice(32), torch.randn(3, 32))):
        program = adapted(kind, model, x)
        folded = qc.fold_adapters(program)
        assert worst(folded(x), program(x)) == 0.0
        program.save(tmp_path / type(model).__name__)
        again = qc.Program.load(tmp_path / type(model).__name__)
        assert worst(again(x), program(x)) == 0.0
        assert str(again) == str(program)


def test_plain_adapters_take_a_base_with_integer_zero_points_and_make_them_real() -> None:
    x = torch.randn(3, 32)
    base = quantized(MLP(32, 8), x)
    assert [site.integer_zero_point for site in base.plan] == [True]
    program = randomize_adapters(qc.insert_adapters(base, qc.AdapterSpec(rank=2)))
    assert [site.integer_zero_point for site in program.plan] == [False]
    folded = qc.fold_adapters(program)
    assert worst(folded(x), program(x)) <= 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "shift"}, "kind is"),
    "zero_point": ({"zero_point": "float"}, "zero_point is"),
    "both": ({"kind": "scale", "zero_point": "integer"}, "with kind 'scale'"),
    "init": ({"kind": "scale", "init": "svd"}, "init is"),
    "group": ({"zero_point": "integer", "group_size": 64}, "group_size is"),
    "rank": ({"kind": "scale", "rank": "auto", "rank_budget": 10}, "rank is 'auto'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_odd_specifications_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UserInputError, match=message):
        qc.AdapterSpec(**options)


def test_zero_points_that_cannot_stay_integers_are_refused() -> None:
    x = torch.randn(2, 32)
    real = qc.quantize_groups(qc.capture_model(MLP(32, 8).eval(), (x,)))
    with pytest.raises(PreconditionError, match="not integers") as caught:
        qc.insert_adapters(real, qc.AdapterSpec(kind="scale"))
    assert caught.value.where == "layers.0"
    with pytest.raises(UserInputError, match="zero_point is 'integer' with method"):
        qc.QuantSpec(method="hqq", zero_point="integer")
    with pytest.raises(UnsupportedError, match="keep zero-points integers"):
        qc.adapt_module_(
            MLP(32, 8),
            (x,),
            quant=qc.QuantSpec(zero_point="integer"),
            adapter=qc.AdapterSpec(kind="scale"),
        )


def test_two_adapters_of_one_weight_do_not_fold() -> None:
    program = adapted("integer", UsedTwice(32), torch.randn(2, 32))
    graph = program.copy_graph()
    first = next(n for n in graph.nodes if n.target is INTEGER_ZERO_LINEAR)
    first.update_arg(9, 7.0)
    with pytest.raises(PreconditionError, match="two different adapters"):
        qc.fold_adapters(program.evolve(graph=graph))


def test_a_fold_that_leaves_the_zero_points_real_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(2, 32)
    program = adapted("integer", MLP(32, 8), x)

    def unrounded(scale: Tensor, offset: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Any:
        return scale, (offset.double() + rest[1] * (b.double() @ a.double())).to(scale.dtype)

    monkeypatch.setattr(adapters, "integer_zero_parameters", unrounded)
    with pytest.raises(InternalError, match="not an integer"):
        qc.fold_adapters(program)


@every_kind
def test_a_wrong_fold_is_found_by_number_and_by_proof(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 32)
    program = adapted(kind, MLP(32, 8), x)
    right = integer_zero_linear.integer_zero_parameters

    def doubled(*arguments: Any) -> Any:
        scale, offset, lora_a, lora_b, bits, scaling, kind = arguments
        return right(scale, offset, lora_a, lora_b, bits, 2 * scaling, kind)

    monkeypatch.setattr(adapters, "integer_zero_parameters", doubled)
    wrong = qc.fold_adapters(program)
    assert not qc.verify_equivalence(program, wrong, [(x,)], qc.Tolerance(max_rel=1e-4)).passed
    assert not qc.prove_equivalence(program, wrong).passed


def test_a_changed_scale_is_caught_where_none_was_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = adapted("integer", MLP(32, 8), torch.randn(2, 32))
    real = fold_module._fold

    def doubled(adapter: Any, names: dict[str, str], tensors: dict[str, Tensor]) -> str:
        tensors[names["scale"]] = tensors[names["scale"]] * 2
        return real(adapter, names, tensors)

    monkeypatch.setattr(fold_module, "_fold", doubled)
    with pytest.raises(PostconditionError, match="a scale"):
        qc.fold_adapters(program)


def test_shapes_are_validated() -> None:
    program = adapted("scale", MLP(32, 8), torch.randn(2, 32))
    tensors = program.tensors()
    tensors["layers.0.lora_A"] = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(InternalError, match="do not chain"):
        validate(program.evolve(graph=program.copy_graph(), tensors=tensors))

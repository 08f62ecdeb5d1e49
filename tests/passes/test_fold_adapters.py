"""fold-adapters: exact, and wrong folds are caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.config import POOLINGS
from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.ir.adapters.base import Adapter
from qalora_compile.ir.meta import move_site
from qalora_compile.ir.spec import GROUP_LINEAR, GROUP_SUM, POOLED_ADAPTER
from qalora_compile.passes import PassResult
from qalora_compile.passes import fold_adapters as pass_module
from tests.models import (
    MLP,
    TRANSFORMERS,
    OneLinear,
    ThreeReaders,
    UsedTwice,
    adapted,
    assert_close,
    token_ids,
    worst,
)

Golden = Callable[[str, str], None]
Fold = Callable[..., str]

X = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))


def example(pooling: str = "sum") -> qc.Program:
    spec = qc.AdapterSpec(rank=3, alpha=4.0, pooling=pooling)
    return adapted(MLP(40, 24, 8).eval(), (X,), qc.QuantSpec(group_size=16), spec)


def test_golden(golden: Golden) -> None:
    golden("fold-adapters", str(qc.fold_adapters(example())))


@given(
    pooling=st.sampled_from(POOLINGS),
    bits=st.sampled_from([2, 3, 4, 8]),
    k=st.integers(1, 40),
    group=st.integers(1, 24),
    times=st.integers(1, 3),
    rank=st.integers(1, 4),
)
@settings(max_examples=15)
def test_folding_is_exact_in_float64(
    pooling: str, bits: int, k: int, group: int, times: int, rank: int
) -> None:
    x = torch.randn(3, k, dtype=torch.float64)
    spec = qc.AdapterSpec(rank=rank, pooling=pooling, group_size=group * times)
    quant = qc.QuantSpec(bits=bits, group_size=group)
    program = adapted(MLP(k, 9, 4).double().eval(), (x,), quant, spec, size=0.5)
    folded = qc.fold_adapters(program)
    assert_close(folded(x), program(x), relative=1e-10)
    ops = {node.target for node in folded.graph.nodes}
    assert GROUP_LINEAR in ops
    assert ops.isdisjoint({POOLED_ADAPTER, GROUP_SUM})
    assert folded.adapter_parameters() == []


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_fold_within_the_contract(name: str) -> None:
    ids = token_ids(2, 16)
    program = adapted(TRANSFORMERS[name](), (ids,))
    folded = qc.fold_adapters(program)
    for shape in ((1, 5), (3, 21)):
        again = token_ids(*shape)
        assert_close(folded(again), program(again), relative=1e-4)


def test_codes_and_scales_are_the_same_tensors() -> None:
    program = example()
    before, after = program.tensors(), qc.fold_adapters(program).tensors()
    for name, tensor in after.items():
        assert (tensor is before[name]) == (not name.endswith(".offset")), name


def test_the_trained_program_is_left_alone() -> None:
    program = example()
    text, value = str(program), program(X)
    qc.fold_adapters(program)
    assert str(program) == text
    assert worst(program(X), value) == 0.0


@pytest.mark.parametrize("model", [UsedTwice(40), ThreeReaders(40)])
def test_shared_weights_and_shared_sums_fold(model: torch.nn.Module) -> None:
    program = adapted(model.eval(), (X,))
    assert_close(qc.fold_adapters(program)(X), program(X), relative=1e-5)


def faulty(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Fold:
    """A fold whose new offset is `change(old offset, right new offset, scale)`."""
    real = pass_module._fold

    def fold(adapter: Adapter, names: Mapping[str, str], tensors: dict[str, Tensor]) -> str:
        offset, scale = tensors[names["offset"]], tensors[names["scale"]]
        moved = real(adapter, names, tensors)
        tensors[names["offset"]] = change(offset, tensors[names["offset"]], scale)
        return moved

    return fold


FAULTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sign of the update": lambda old, new, scale: 2 * old - new,
    "pooling factor forgotten": lambda old, new, scale: old + (new - old) / 16,
    "divided by the scale": lambda old, new, scale: old + (new - old) / scale,
    "zero-point rounded": lambda old, new, scale: -(-new / scale).round() * scale,
    "tail group left out": lambda old, new, scale: torch.cat([new[:, :-1], old[:, -1:]], 1),
    "groups permuted": lambda old, new, scale: new.flip(1),
    "rows permuted": lambda old, new, scale: new.roll(1, 0),
    "nothing folded": lambda old, new, scale: old,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_wrong_fold_is_caught_and_its_site_named(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = example()
    monkeypatch.setattr(pass_module, "_fold", faulty(FAULTS[kind]))
    wrong = qc.fold_adapters(program)
    report = qc.verify_equivalence(program, wrong, [(X,)], qc.Tolerance(max_rel=1e-4))
    assert not report.passed
    assert report.first_divergence == "layers.0"


def test_an_offset_that_is_not_finite_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_module, "_fold", faulty(lambda old, new, scale: new / 0))
    with pytest.raises(PostconditionError, match="not finite"):
        qc.fold_adapters(example())


def test_folding_before_adapters_or_twice_is_refused() -> None:
    quantized = qc.quantize_groups(qc.capture_model(MLP(40, 8).eval(), (X,)))
    with pytest.raises(PreconditionError, match="insert_adapters"):
        qc.fold_adapters(quantized)
    with pytest.raises(PreconditionError, match="folded already"):
        qc.fold_adapters(qc.fold_adapters(example()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_adapters_that_are_not_finite_are_named(bad: float) -> None:
    program = example()
    with torch.no_grad():
        dict(program.named_adapter_parameters())["layers.1.lora_B"][0, 0] = bad
    with pytest.raises(PreconditionError, match="NaN or infinite") as caught:
        qc.fold_adapters(program)
    assert caught.value.where == "layers.1.lora_B"


def test_an_adapter_in_another_form_is_refused() -> None:
    program = example()
    graph = program.copy_graph()
    sums = [n for n in graph.nodes if n.target is GROUP_SUM]
    sums[1].args = (next(n for n in graph.nodes if n.op == "placeholder"), sums[1].args[1])
    with pytest.raises(PreconditionError, match="pools another tensor"):
        qc.fold_adapters(program.evolve(graph=graph))


@given(
    rslora=st.booleans(),
    alpha=st.floats(-8, 8),
    rank=st.integers(1, 6),
    times=st.integers(1, 3),
    k=st.integers(1, 30),
)
@settings(max_examples=10)
def test_rank_and_alpha_fold_with_either_scaling(
    rslora: bool, alpha: float, rank: int, times: int, k: int
) -> None:
    x = torch.randn(2, k, dtype=torch.float64)
    spec = qc.AdapterSpec(rank=rank, alpha=alpha, use_rslora=rslora, group_size=7 * times)
    program = adapted(OneLinear(k, 5).double().eval(), (x,), qc.QuantSpec(group_size=7), spec)
    folded = qc.fold_adapters(program)
    assert_close(folded(x), program(x), relative=1e-10)
    lora_a, lora_b = (p.detach() for p in program.adapter_parameters())
    moved = folded.tensors()["fc.offset"] - program.tensors()["fc.offset"]
    for group in range(moved.shape[1]):
        expected = alpha / rank ** (0.5 if rslora else 1) * lora_b @ lora_a[:, group // times]
        assert torch.allclose(moved[:, group], expected, rtol=1e-9, atol=1e-12)


@given(factor=st.floats(-5, 5), pooling=st.sampled_from(POOLINGS))
@settings(max_examples=10)
def test_folding_is_linear_in_b(factor: float, pooling: str) -> None:
    x = torch.randn(2, 20, dtype=torch.float64)
    program = qc.insert_adapters(
        qc.quantize_groups(
            qc.capture_model(OneLinear(20, 6).double().eval(), (x,)), qc.QuantSpec(group_size=8)
        ),
        qc.AdapterSpec(rank=3, pooling=pooling),
    )
    start = program.tensors()["fc.offset"]
    lora_b = dict(program.named_adapter_parameters())["fc.lora_B"]
    first, second = torch.randn(2, *lora_b.shape, dtype=torch.float64)

    def moved(value: Tensor) -> Tensor:
        with torch.no_grad():
            lora_b.copy_(value)
        return qc.fold_adapters(program).tensors()["fc.offset"] - start

    expected = factor * moved(first) + moved(second)
    assert torch.allclose(moved(factor * first + second), expected, rtol=1e-9, atol=1e-11)
    assert float(moved(torch.zeros_like(first)).abs().max()) == 0.0


def used_twice(pool: int = 24) -> tuple[qc.Program, fx.Graph, list[fx.Node]]:
    """A program whose first weight is used twice, a copy of its graph, and the two updates."""
    spec = qc.AdapterSpec(rank=2, group_size=pool)
    program = adapted(UsedTwice(40).eval(), (X,), qc.QuantSpec(group_size=8), spec)
    graph = program.copy_graph()
    updates = [n for n in graph.nodes if n.target is POOLED_ADAPTER]
    shared = [n for n in updates if str(n.args[1].target).startswith("shared.")]
    assert len(shared) == 2
    return program, graph, shared


def test_two_adapters_of_one_weight_are_refused() -> None:
    program, graph, (_, second) = used_twice()
    with graph.inserting_before(next(iter(graph.nodes))):
        other = [graph.get_attr(f"shared.other.{part}") for part in ("lora_A", "lora_B")]
    second.args = (second.args[0], *other, second.args[3])
    tensors = program.tensors()
    for part in ("lora_A", "lora_B"):
        copied = tensors[f"shared.{part}"].detach().clone() + 0.5
        tensors[f"shared.other.{part}"] = nn.Parameter(copied)
    with pytest.raises(PreconditionError, match="two different adapters") as caught:
        qc.fold_adapters(program.evolve(graph=graph, tensors=tensors))
    assert caught.value.where == "shared@2"


def test_two_scalings_of_one_adapter_are_refused() -> None:
    program, graph, (_, second) = used_twice()
    second.args = (*second.args[:3], 2 * float(second.args[3]))  # type: ignore[arg-type]
    with pytest.raises(PreconditionError, match="two different adapters"):
        qc.fold_adapters(program.evolve(graph=graph))


def test_two_poolings_of_one_adapter_are_refused() -> None:
    """40 columns are two groups of 24 and two of 32: the same A serves both, the fold does not."""
    program, graph, (_, second) = used_twice()
    pooled = second.args[0]
    assert isinstance(pooled, fx.Node) and len(pooled.users) == 1
    pooled.args = (pooled.args[0], 32)
    with pytest.raises(PreconditionError, match="two different adapters"):
        qc.fold_adapters(program.evolve(graph=graph))


def test_a_weight_of_which_one_use_has_no_adapter_is_refused() -> None:
    """Its offset is shared: folding for one use would change the other as well."""
    program, graph, (_, second) = used_twice()
    (total,) = second.users
    base = total.args[0]
    assert isinstance(base, fx.Node)
    move_site(total, base)
    total.replace_all_uses_with(base)
    graph.erase_node(total)
    graph.eliminate_dead_code()
    half = program.evolve(graph=graph)
    with pytest.raises(PreconditionError):
        qc.fold_adapters(half)


def test_a_pool_that_does_not_fit_the_weight_is_refused() -> None:
    program, graph, updates = used_twice()
    for update in updates:
        pooled = update.args[0]
        assert isinstance(pooled, fx.Node)
        pooled.args = (pooled.args[0], 20)  # two groups as well, but 20 is no multiple of 8
    with pytest.raises(PreconditionError, match="groups of 20, .* groups of 8") as caught:
        qc.fold_adapters(program.evolve(graph=graph))
    assert caught.value.where == "shared"
    assert "multiple of 8" in str(caught.value.hint)


def test_an_adapter_that_is_read_elsewhere_is_refused() -> None:
    program = example()
    graph = program.copy_graph()
    update = next(n for n in graph.nodes if n.target is POOLED_ADAPTER)
    (total,) = update.users
    with graph.inserting_after(total):
        again = graph.call_function(torch.ops.aten.add.Tensor, (total, update))
    total.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    with pytest.raises(PreconditionError, match="not simply added"):
        qc.fold_adapters(program.evolve(graph=graph))


def test_a_layer_that_is_read_without_its_adapter_is_refused() -> None:
    program = example()
    graph = program.copy_graph()
    total = next(n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor)
    with graph.inserting_after(total):
        again = graph.call_function(torch.ops.aten.mul.Tensor, (total, total.args[0]))
    total.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    with pytest.raises(PreconditionError, match="added to no quantized layer"):
        qc.fold_adapters(program.evolve(graph=graph))


def test_an_adapter_on_either_side_of_the_sum_folds() -> None:
    program = example()
    graph = program.copy_graph()
    for total in [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]:
        total.args = total.args[::-1]
    changed = program.evolve(graph=graph)
    expected = qc.fold_adapters(program)
    assert worst(qc.fold_adapters(changed)(X), expected(X)) == 0.0


def test_the_plan_forgets_the_rank_and_keeps_the_rest() -> None:
    program = example()
    after = qc.fold_adapters(program)
    assert [s.rank for s in program.plan] == [3, 3]
    assert [s.rank for s in after.plan] == [None, None]
    assert [dataclasses.replace(s, rank=3) for s in after.plan] == list(program.plan)


@pytest.mark.parametrize("leaf", ["scale", "qweight"])
def test_a_fold_that_touches_codes_or_scales_is_caught(
    leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pass_module.FoldAdapters.call

    def rescaled(self: pass_module.FoldAdapters, program: qc.Program) -> PassResult:
        result = real(self, program)
        tensors = result.program.tensors()
        tensors[f"layers.1.{leaf}"] = tensors[f"layers.1.{leaf}"].clone()
        changed = result.program.evolve(graph=result.program.copy_graph(), tensors=tensors)
        return dataclasses.replace(result, program=changed)

    monkeypatch.setattr(pass_module.FoldAdapters, "call", rescaled)
    with pytest.raises(PostconditionError, match="changed codes or a scale") as caught:
        qc.fold_adapters(example())
    assert caught.value.where == f"layers.1.{leaf}"


def test_a_fold_that_leaves_an_adapter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(self: pass_module.FoldAdapters, program: qc.Program) -> PassResult:
        return PassResult(program.evolve(graph=program.copy_graph()))

    monkeypatch.setattr(pass_module.FoldAdapters, "call", idle)
    with pytest.raises(PostconditionError, match="adapter node is left") as caught:
        qc.fold_adapters(example())
    assert caught.value.pass_name == "fold-adapters"

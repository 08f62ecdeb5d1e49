"""fold-adapters: exact, and wrong folds are caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qalora_compile as qc
from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.ir.spec import GROUP_LINEAR, GROUP_SUM, POOLED_ADAPTER
from qalora_compile.passes import fold_adapters as pass_module
from tests.models import (
    MLP,
    TRANSFORMERS,
    ThreeReaders,
    UsedTwice,
    adapted,
    assert_close,
    token_ids,
    worst,
)

Golden = Callable[[str, str], None]
Fold = Callable[..., tuple[Tensor, float]]

X = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))


def example(pooling: str = "sum") -> qc.Program:
    spec = qc.AdapterSpec(rank=3, alpha=4.0, pooling=pooling)
    return adapted(MLP(40, 24, 8).eval(), (X,), qc.QuantSpec(group_size=16), spec)


def test_golden(golden: Golden) -> None:
    golden("fold-adapters", str(qc.fold_adapters(example())))


@given(
    pooling=st.sampled_from(["sum", "mean", "mean_times_groups"]),
    bits=st.sampled_from([2, 3, 4, 8]),
    k=st.integers(1, 40),
    group=st.integers(1, 24),
    times=st.integers(1, 3),
    rank=st.integers(1, 4),
)
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

    def fold(
        program: qc.Program, adapter: pass_module.Adapter, offset: Tensor
    ) -> tuple[Tensor, float]:
        right, largest = real(program, adapter, offset)
        scale = program.tensors()[str(adapter.base.args[2].target)]  # type: ignore[union-attr]
        return change(offset, right, scale), largest

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

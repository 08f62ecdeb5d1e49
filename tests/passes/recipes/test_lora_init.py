"""Adapters that start as the best correction of the quantization error, and ranks chosen by it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.skeleton import skeleton_of
from qalora_compile.config import POOLINGS
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.affine import dequantize, expand_groups, sum_groups
from qalora_compile.ir.site_plan import Site
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.insert_adapters import InsertAdapters
from qalora_compile.passes.recipes.replay import replay
from qalora_compile.quantizers.calibrate import collect_statistics
from tests.exporters.test_experts import Grouped
from tests.models import (
    MLP,
    OneLinear,
    SquareConv1D,
    TiedHead,
    UsedTwice,
    assert_close,
    gpt2,
    llama,
    scale_of,
    token_ids,
)
from tests.quantizers.pooled import pooled_residual

SVD = qc.AdapterSpec(rank=4, init="svd")


def correlated(rows: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5
    return torch.randn(rows, k, generator=generator, dtype=torch.float64) @ mix + 0.3


def started(
    captured: qc.Program,
    quant: qc.QuantSpec,
    adapter: qc.AdapterSpec = SVD,
    calls: Sequence[tuple[Tensor, ...]] | None = None,
) -> tuple[qc.Program, qc.Program]:
    """The quantized program, and the same with adapters that start by the float weights."""
    quantized = qc.quantize_groups(captured, quant)
    return quantized, qc.insert_adapters(quantized, adapter, source=captured, calibration=calls)


def lost(captured: qc.Program, quantized: qc.Program, path: str) -> Tensor:
    """W − Wq of a linear layer."""
    site = next(s for s in quantized.plan if s.path == path)
    parts = [quantized.tensors()[f"{path}.{name}"] for name in ("qweight", "scale", "offset")]
    assert site.bits is not None and site.group_size is not None
    on_codes = dequantize(*parts, bits=site.bits, group_size=site.group_size, k=site.k)
    return captured.tensors()[site.weight].detach() - on_codes


@given(
    pooling=st.sampled_from(POOLINGS),
    bits=st.sampled_from([2, 3, 4, 8]),
    k=st.integers(1, 40),
    group=st.integers(1, 16),
    times=st.integers(1, 3),
    rank=st.integers(1, 6),
    alpha=st.sampled_from([-2.0, 0.5, 32.0]),
    calibrated=st.booleans(),
)
@settings(max_examples=12)
def test_at_full_rank_what_is_added_is_the_refinement(
    pooling: str,
    bits: int,
    k: int,
    group: int,
    times: int,
    rank: int,
    alpha: float,
    calibrated: bool,
) -> None:
    """Scaling and pooling factor are taken out, whatever they are; and the program still folds."""
    x, pool = correlated(60, k), group * times
    captured = qc.capture_model(OneLinear(k, 3).double().eval(), (x,))
    spec = qc.AdapterSpec(rank=rank, alpha=alpha, pooling=pooling, group_size=pool, init="svd")
    quant = qc.QuantSpec(bits=bits, group_size=group)
    calls = [(x,)] if calibrated else None
    quantized, program = started(captured, quant, spec, calls)
    change = lost(captured, quantized, "fc")
    if calibrated:
        full = pooled_residual(change, collect_statistics(quantized, [(x,)])["fc"], pool)
    else:
        full = sum_groups(change, pool) / sum_groups(torch.ones(k, dtype=torch.float64), pool)
    if rank >= min(full.shape):
        update = x @ expand_groups(full, pool, k).T
        error = (program(x) - quantized(x) - update).detach().abs().max()
        assert float(error) <= 1e-7 * max(1.0, scale_of(update))
    assert_close(qc.fold_adapters(program)(x), program(x), relative=1e-10)
    before, after = ((p(x) - captured(x)).detach().square().sum() for p in (quantized, program))
    if calibrated:
        assert after <= before * (1 + 1e-9) + 1e-20


def test_the_error_of_the_program_falls_with_the_rank() -> None:
    x = correlated(200, 48)
    captured = qc.capture_model(OneLinear(48, 20).double().eval(), (x,))
    errors = []
    for rank in (1, 2, 3, 6, 9):
        spec = dataclasses.replace(SVD, rank=rank)
        _, program = started(captured, qc.QuantSpec(bits=2, group_size=8), spec, [(x,)])
        errors.append(float((program(x) - captured(x)).detach().square().sum()))
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[3] == pytest.approx(errors[4], rel=1e-9), "six groups have no more than rank 6"


FLAT = {
    "equal": lambda w: w.fill_(0.75),
    "zeros": lambda w: w.zero_(),
    "tiny": lambda w: w.fill_(1e-30),
    "large": lambda w: w.fill_(6e4),
    "one-sided": lambda w: w.abs_().add_(1.0),
    "negative": lambda w: w.abs_().neg_().sub_(1.0),
}


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("calibrated", [False, True])
def test_flat_and_one_sided_groups(kind: str, calibrated: bool) -> None:
    model, x = OneLinear(20, 6).double().eval(), correlated(40, 20)
    with torch.no_grad():
        FLAT[kind](model.fc.weight[:, :8])
    captured = qc.capture_model(model, (x,))
    quantized, program = started(
        captured, qc.QuantSpec(bits=3, group_size=8), SVD, [(x,)] if calibrated else None
    )
    assert all(p.isfinite().all() for p in program.adapter_parameters())
    before, after = ((p(x) - captured(x)).detach().square().sum() for p in (quantized, program))
    if calibrated:
        assert after <= before * (1 + 1e-9)
    assert_close(qc.fold_adapters(program)(x), program(x), relative=1e-9)


def test_a_weight_without_error_starts_where_it_was_and_can_learn() -> None:
    model, x = OneLinear(16, 6).double().eval(), torch.randn(5, 16).double()
    with torch.no_grad():
        model.fc.weight.copy_(torch.arange(16.0).repeat(6, 1))  # sixteen levels
    captured = qc.capture_model(model, (x,))
    quantized, program = started(captured, qc.QuantSpec(bits=4, group_size=16), SVD)
    assert_close(program(x), quantized(x), relative=1e-12)
    program(x).sum().backward()
    assert all(p.grad is not None for p in program.adapter_parameters())
    assert any(p.grad.any() for p in program.adapter_parameters() if p.grad is not None)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv1d": (lambda: SquareConv1D(40), lambda: torch.randn(30, 40)),
    "used twice": (UsedTwice, lambda: torch.randn(30, 32)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True),
        lambda: torch.randn(3, 9, 32),
    ),
    "experts": (Grouped, lambda: torch.randn(30, 40)),
    "gpt2": (gpt2, lambda: token_ids(3, 12)),
    "llama": (llama, lambda: token_ids(3, 12)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_kind_of_site_comes_nearer_to_its_model(name: str, calibrated: bool) -> None:
    build, data = MODELS[name]
    torch.manual_seed(1)
    model, x = build().eval(), data()
    captured = qc.capture_model(model, (x,))
    spec = dataclasses.replace(SVD, rank=64)
    quant = qc.QuantSpec(bits=2, group_size=8)
    quantized, program = started(captured, quant, spec, [(x,)] if calibrated else None)

    def error(other: qc.Program) -> float:
        pairs = zip(logits(other(x)), logits(captured(x)), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    assert error(program) < 0.95 * error(quantized)
    folded = qc.fold_adapters(program)
    assert_close(logits(folded(x)), logits(program(x)), relative=1e-4)


def logits(output: object) -> list[Tensor]:
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return [found]


def test_calibration_makes_the_output_error_smaller_than_the_weights_alone() -> None:
    x = correlated(300, 48)
    captured = qc.capture_model(OneLinear(48, 20).double().eval(), (x,))
    quant = qc.QuantSpec(bits=2, group_size=8)
    plain, weighted = (started(captured, quant, SVD, c)[1] for c in (None, [(x,)]))
    errors = [float((p(x) - captured(x)).detach().square().sum()) for p in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


def test_refined_offsets_leave_nothing_to_correct() -> None:
    x = correlated(60_000, 48)  # few rows are damped more
    captured = qc.capture_model(OneLinear(48, 20).double().eval(), (x,))
    spec = qc.QuantSpec(bits=2, group_size=8)
    refined = qc.quantize_groups(captured, spec, calibration=[(x,)])
    adapted = qc.insert_adapters(refined, SVD, source=captured, calibration=[(x,)])
    assert_close(adapted(x), refined(x), relative=1e-3)  # the damping, twice
    _, full = started(captured, spec, dataclasses.replace(SVD, rank=6), [(x,)])
    assert_close(full(x), refined(x), relative=1e-6)


def test_an_annotated_source_with_its_own_targets() -> None:
    ids = torch.arange(12).reshape(2, 6)
    captured = qc.capture_model(TiedHead().eval(), (ids,))
    annotated = AnnotateLinears(targets=("lm_head",))(captured).program
    quantized = qc.quantize_groups(annotated, qc.QuantSpec(bits=2))
    from_annotated = qc.insert_adapters(quantized, SVD, source=annotated)
    by_name = qc.quantize_groups(captured, qc.QuantSpec(bits=2), targets=("lm_head",))
    from_float = qc.insert_adapters(by_name, SVD, source=captured)
    assert_close(from_annotated(ids), from_float(ids), relative=1e-6)


def test_the_model_can_be_adapted_in_place() -> None:
    model, ids = llama(), token_ids(2, 12)
    with torch.no_grad():
        expected = model(ids).logits.clone()
    spec = dataclasses.replace(SVD, rank=8)
    quant = qc.QuantSpec(bits=2, group_size=8, refine_offsets=False)
    program = qc.adapt_module_(model, (ids,), quant=quant, adapter=spec, calibration=[(ids,)])
    with torch.no_grad():
        error = (model(ids).logits - expected).square().sum()
        for name, parameter in program.named_adapter_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
        plain = (model(ids).logits - expected).square().sum()
    assert error < 0.95 * plain


# Ranks


def budgeted(budget: int, x: Tensor, init: str = "zeros") -> tuple[qc.Program, qc.Program]:
    torch.manual_seed(0)
    captured = qc.capture_model(MLP(48, 24, 40, 6).double().eval(), (x,))
    spec = qc.AdapterSpec(rank="auto", rank_budget=budget, init=init)
    return captured, started(captured, qc.QuantSpec(bits=2, group_size=8), spec, [(x,)])[1]


@pytest.mark.parametrize("init", ["zeros", "svd"])
def test_ranks_within_a_budget(init: str) -> None:
    x = correlated(200, 48)
    _, program = budgeted(260, x, init)
    ranks = {site.path: site.rank for site in program.plan}
    sizes = {n: p.shape for n, p in program.named_adapter_parameters()}
    assert all(
        sizes[f"{path}.lora_A"][0] == sizes[f"{path}.lora_B"][1] == rank
        for path, rank in ranks.items()
    )
    assert 220 < sum(p.numel() for p in program.adapter_parameters()) <= 260
    assert len(set(ranks.values())) > 1
    assert all("ranks correct" in site.why_rank for site in program.plan)
    folded = qc.fold_adapters(program)
    assert_close(folded(x), program(x), relative=1e-10)
    assert not any(site.why_rank or site.rank for site in folded.plan)


def test_chosen_ranks_are_better_than_equal_ones_at_equal_parameters() -> None:
    """Errors relative to each layer's output, summed: what the choice is made by."""
    x = correlated(400, 48)
    torch.manual_seed(0)
    captured = qc.capture_model(MLP(48, 24, 40, 6).double().eval(), (x,))
    quant = qc.QuantSpec(bits=2, group_size=8)
    _, uniform = started(captured, quant, dataclasses.replace(SVD, rank=2), [(x,)])
    parameters = sum(p.numel() for p in uniform.adapter_parameters())
    spec = qc.AdapterSpec(rank="auto", rank_budget=parameters, init="svd")
    _, chosen = started(captured, quant, spec, [(x,)])
    assert sum(p.numel() for p in chosen.adapter_parameters()) <= parameters
    annotated = qc.Pipeline.parse("annotate-linears")(captured).program
    statistics = collect_statistics(annotated, [(x,)])

    def left(program: qc.Program) -> float:
        total, folded = 0.0, qc.fold_adapters(program)
        for path, known in statistics.items():
            weight = captured.tensors()[f"{path}.weight"].detach()
            change = lost(captured, folded, path)
            total += known.output_error(change) / known.output_error(weight)
        return total

    assert left(chosen) < left(uniform)


def test_a_budget_that_is_too_small_names_the_least() -> None:
    with pytest.raises(UserInputError, match="rank 1") as caught:
        budgeted(80, correlated(20, 48))
    assert caught.value.hint == "the least is 84"


def test_chosen_ranks_are_saved_replayed_and_parsed(tmp_path: Path) -> None:
    model, ids = llama(), token_ids(2, 16)
    calls = (ids, torch.ones_like(ids))
    captured = qc.capture_model(model, calls)
    spec = qc.AdapterSpec(rank="auto", rank_budget=6000, init="svd")
    _, program = started(captured, qc.QuantSpec(bits=3), spec, [calls])
    ranks = {site.name: (site.rank, site.why_rank) for site in program.plan}
    assert len({rank for rank, _ in ranks.values()}) > 2
    program.save(tmp_path / "run")
    loaded = qc.Program.load(tmp_path / "run")
    assert {site.name: (site.rank, site.why_rank) for site in loaded.plan} == ranks
    assert_close(loaded(*calls).logits, program(*calls).logits, relative=1e-6)
    cached = replay(program, capture_causal_lm(skeleton_of(model)))
    assert cached.tensors().keys() == program.tensors().keys()
    assert {site.name: (site.rank, site.why_rank) for site in cached.plan} == ranks
    again = qc.Pipeline.parse(",".join(program.history))(captured).program
    assert [site.rank for site in again.plan] == [site.rank for site in program.plan]


def test_ranks_by_hand() -> None:
    x = torch.randn(2, 16)
    quantized = qc.quantize_groups(qc.capture_model(MLP(16, 8, 4).eval(), (x,)))
    text = 'insert-adapters{rank=2,ranks=["layers.1=3"]}'
    program = qc.Pipeline.parse(text)(quantized).program
    assert [site.rank for site in program.plan] == [2, 3]
    factors = [n.args[-1] for n in program.graph.nodes if "pooled_adapter" in str(n.target)]
    assert factors == [32 / 2, 32 / 3]


# Faults


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (("layers.2=3",), "near ones: layers"),
        (("layers.1",), "path=value"),
        (("layers.1=0",), "1 or more"),
        (("layers.1=two",), "1 or more"),
        (("layers.1=2", "layers.1=3"), "once"),
    ],
)
def test_ranks_that_make_no_sense_are_refused(ranks: tuple[str, ...], words: str) -> None:
    quantized = qc.quantize_groups(qc.capture_model(MLP(16, 8, 4).eval(), (torch.randn(2, 16),)))
    with pytest.raises(UserInputError) as caught:
        InsertAdapters(ranks=ranks)(quantized)
    assert words in str(caught.value.hint)


@pytest.mark.parametrize("options", [{"init": "svd"}, {"rank": "auto", "rank_budget": 99}])
def test_what_needs_the_float_weights_says_so(options: dict[str, object]) -> None:
    spec = qc.AdapterSpec(**options)  # type: ignore[arg-type]
    captured = qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    quantized = qc.quantize_groups(captured)
    with pytest.raises(PreconditionError, match="before quantization") as caught:
        qc.insert_adapters(quantized, spec)
    assert "source=" in str(caught.value.hint)
    with pytest.raises(UserInputError, match="pass lacks the float weights"):
        InsertAdapters(**spec.to_json())
    with pytest.raises(PreconditionError, match="float weights are wanted"):
        qc.insert_adapters(quantized, spec, source=quantized)


def test_another_model_is_refused() -> None:
    x = torch.randn(2, 16)
    quantized = qc.quantize_groups(qc.capture_model(MLP(16, 8).eval(), (x,)))
    for other in (MLP(16, 9), OneLinear(16, 8)):
        with pytest.raises(PreconditionError, match="no such weight"):
            qc.insert_adapters(quantized, SVD, source=qc.capture_model(other.eval(), (x,)))


def test_weights_that_were_not_read_are_refused() -> None:
    model, ids = llama(), token_ids(2, 16)
    quantized = qc.quantize_groups(qc.capture_model(model, (ids, torch.ones_like(ids))))
    with pytest.raises(PreconditionError, match="not read yet"):
        qc.insert_adapters(quantized, SVD, source=capture_causal_lm(skeleton_of(model)))


def test_a_scaling_of_zero_is_refused() -> None:
    x = torch.randn(2, 16)
    captured = qc.capture_model(MLP(16, 8).eval(), (x,))
    with pytest.raises(UserInputError, match="alpha 0"):
        started(captured, qc.QuantSpec(), dataclasses.replace(SVD, alpha=0.0))


def test_a_scaling_that_is_left_in_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(50, 16)
    captured = qc.capture_model(OneLinear(16, 8).double().eval(), (x,))
    quant = qc.QuantSpec(bits=2, group_size=4)
    quantized, right = started(captured, quant, SVD, [(x,)])
    real = InsertAdapters.factor_of
    calls = []

    def once(self: InsertAdapters, site: Site) -> float:
        calls.append(site)
        return real(self, site) if len(calls) == 1 else 1.0  # the graph's, then that taken out

    monkeypatch.setattr(InsertAdapters, "factor_of", once)
    _, wrong = started(captured, quant, SVD, [(x,)])
    errors = [
        float((p(x) - captured(x)).detach().square().sum()) for p in (right, quantized, wrong)
    ]
    assert errors[0] < errors[1] < errors[2]

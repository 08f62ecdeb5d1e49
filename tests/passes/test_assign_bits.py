"""assign-bits: bits of each weight, by hand or within a budget, through every stage and target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.skeleton import skeleton_of
from qalora_compile.config import BUDGET_UNITS
from qalora_compile.errors import PostconditionError, PreconditionError, UserInputError
from qalora_compile.passes.assign_bits import AssignBits
from qalora_compile.passes.framework.base import PassResult
from qalora_compile.passes.recipes.choose_bits import _budget as budget_of
from qalora_compile.passes.recipes.choose_bits import choose_bits
from qalora_compile.passes.recipes.replay import replay
from qalora_compile.quantizers.sensitivity import measure_sensitivities
from qalora_compile.runtime import open_session
from tests.exporters.test_experts import Grouped
from tests.models import (
    MLP,
    UsedTwice,
    assert_close,
    llama,
    randomize_adapters,
    token_ids,
)
from tests.passes.recipes.test_lora_init import correlated


def by_hand(model: torch.nn.Module, x: Tensor, **choices: str) -> qc.Program:
    """Quantized with the given `bits/group` by path, `.` written `__`, and 4/32 elsewhere."""
    texts = tuple(f"{path.replace('__', '.')}={value}" for path, value in choices.items())
    steps = qc.Pipeline.parse("canonicalize-pointwise,annotate-linears").passes
    quantize = qc.Pipeline.parse("quantize-groups").passes
    pipeline = qc.Pipeline([*steps, AssignBits(choices=texts), *quantize])
    return pipeline(qc.capture_model(model.eval(), (x,))).program


def auto(model: torch.nn.Module, x: Tensor, budget: float, **options: object) -> qc.Program:
    spec = qc.QuantSpec(bits="auto", budget=budget, **options)  # type: ignore[arg-type]
    captured = qc.capture_model(model.eval(), (x,))
    return qc.quantize_groups(captured, spec, calibration=[(x,)])


def squared_error(program: qc.Program, model: torch.nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((program(x) - model(x)).square().sum())


def mean_bits(program: qc.Program) -> float:
    rows = program.plan.weights_to_quantize()
    sizes = [(site.experts or 1) * site.n * site.k for site in rows]
    return sum(size * (row.bits or 0) for size, row in zip(sizes, rows, strict=True)) / sum(sizes)


def test_golden(golden: Callable[[str, str], None]) -> None:
    program = by_hand(MLP(16, 24, 8), torch.randn(2, 16), layers__0="3/8")
    golden("assign-bits", str(program))


def test_each_weight_is_quantized_as_the_plan_says() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(5, 40, dtype=torch.float64), MLP(40, 24, 20, 6).double()
    program = by_hand(model, x, layers__0="8/8", layers__1="2/5")
    assert [(s.bits, s.group_size) for s in program.plan] == [(8, 8), (2, 5), (4, 32)]
    shapes = {n: tuple(t.shape) for n, t in program.tensors().items()}
    assert shapes["layers.0.qweight"] == (24, 40) and shapes["layers.0.scale"] == (24, 5)
    assert shapes["layers.1.qweight"] == (20, 6) and shapes["layers.1.scale"] == (20, 5)
    alone = {
        bits: qc.quantize_groups(
            qc.capture_model(model, (x,)), qc.QuantSpec(bits=bits, group_size=group)
        ).tensors()
        for bits, group in ((8, 8), (2, 5))
    }
    for path, bits in (("layers.0", 8), ("layers.1", 2)):
        for part in ("qweight", "scale", "offset"):
            name = f"{path}.{part}"
            torch.testing.assert_close(program.tensors()[name], alone[bits][name], rtol=0, atol=0)


def test_the_plan_says_what_is_meant_until_it_is_done() -> None:
    x = torch.randn(2, 16)
    annotated = qc.Pipeline.parse("annotate-linears")(
        qc.capture_model(MLP(16, 8, 4).eval(), (x,))
    ).program
    assigned = AssignBits(choices=("layers.1=3/16",))(annotated).program
    rows = [(s.bits, s.chosen_bits, s.chosen_group) for s in assigned.plan]
    assert rows == [(None, None, None), (None, 3, 16)]
    done = qc.quantize_groups(assigned)
    assert [(s.bits, s.group_size, s.chosen_bits) for s in done.plan] == [
        (4, 32, None),
        (3, 16, None),
    ]


def test_all_rows_of_a_weight_get_the_same() -> None:
    program = by_hand(UsedTwice(), torch.randn(3, 32), shared="3/16")
    assert [s.bits for s in program.plan if s.path == "shared"] == [3, 3]


@pytest.mark.parametrize("target", ["ort", "ort-stock", "onnx"])
@pytest.mark.parametrize("library", [False, True])
def test_mixed_programs_run_exported(target: str, library: bool, tmp_path: Path) -> None:
    """Folded adapters of two ranks on codes of four widths, with tails, in ONNX Runtime."""
    if library and target != "ort":
        pytest.skip("the library's operator is in target ort alone")
    torch.manual_seed(0)
    x = torch.randn(6, 72)
    model = MLP(72, 40, 48, 36, 8)
    choices = {"layers__0": "2/16", "layers__1": "3/16", "layers__2": "8/32", "layers__3": "4/64"}
    quantized = by_hand(model, x, **choices)
    insert = qc.Pipeline.parse('insert-adapters{rank=2,ranks=["layers.1=5"]},share-group-sums')
    adapted = randomize_adapters(insert(quantized).program)
    folded = qc.fold_adapters(adapted)
    assert_close(folded(x), adapted(x), relative=1e-5)
    path = tmp_path / "model.onnx"
    qc.export_model(folded, path, qc.ExportSpec(target=target))
    session = open_session(path, library=library, exact=True)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), folded(x), relative=1e-5)


def test_experts_and_their_head_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 40)
    program = auto(Grouped(), x, 3.5, group_size=8)
    assert len({site.bits for site in program.plan.to_quantize()}) > 1
    assert mean_bits(program) <= 3.5
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(program)))
    qc.export_model(folded, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", library=False)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), folded(x), relative=1e-4)


@pytest.mark.parametrize("budget", [2.0, 2.7, 3.3, 5.0, 99.0])
def test_the_budget_is_kept_and_used(budget: float) -> None:
    torch.manual_seed(0)
    program = auto(MLP(48, 24, 40, 36, 6), torch.randn(40, 48), budget, group_size=8)
    assert mean_bits(program) <= budget
    sizes = [site.n * site.k for site in program.plan]
    left = (budget - mean_bits(program)) * sum(sizes)
    for site, size in zip(program.plan, sizes, strict=True):
        wider = {2: 3, 3: 4, 4: 8, 8: 10**9}[site.bits or 0]
        assert size * (wider - (site.bits or 0)) > left, "what is left would do for another width"
    assert all("of the loss" in site.why_bits for site in program.plan)


def test_more_budget_loses_less() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(40, 48), MLP(48, 24, 40, 36, 6)
    errors = [
        squared_error(auto(model, x, budget, group_size=8), model, x)
        for budget in (2.0, 2.5, 3.0, 4.0, 8.0)
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_megabyte_budget_counts_what_is_stored() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 48)
    program = auto(MLP(48, 24, 40, 36, 6), x, 0.0055, budget_unit="megabytes", group_size=8)
    assert 5000 < stored_bytes(program) <= 5500


def test_stored_bits_count_scales_and_offsets() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 48)
    options = {"group_size": 8, "refine_offsets": False}
    program = auto(MLP(48, 24, 40, 36, 6), x, 11.5, budget_unit="stored-bits", **options)
    stored = 8 * stored_bytes(program) / sum(site.n * site.k for site in program.plan)
    assert 10.5 < stored <= 11.5


def test_groups_are_chosen_with_the_bits(tmp_path: Path) -> None:
    """Equal bytes: chosen groups lose less than any one, and the export is as it is trained."""
    torch.manual_seed(0)
    x, model = correlated(80, 160).float(), MLP(160, 96, 160, 12)
    groups = ("auto", 32, 64, 128)
    budget = {"budget_unit": "stored-bits", "refine_offsets": False}
    programs = {g: auto(model, x, 4.0, group_size=g, **budget) for g in groups}
    chosen = programs["auto"]
    assert len({site.group_size for site in chosen.plan}) > 1
    assert all(stored_bytes(p) * 8 <= 4.0 * weights(p) for p in programs.values())
    errors = {g: squared_error(p, model, x) for g, p in programs.items()}
    assert errors["auto"] < 1.02 * min(errors.values()), errors
    assert "in groups of" in chosen.plan.sites[0].why_bits
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(chosen)))
    qc.export_model(folded, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", library=False, exact=True)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), folded(x), relative=1e-5)


def stored_bytes(program: qc.Program) -> int:
    """Bytes of codes, scales and offsets."""
    parts = (".qweight", ".scale", ".offset")
    return sum(
        t.numel() * t.element_size() for n, t in program.tensors().items() if n.endswith(parts)
    )


def weights(program: qc.Program) -> int:
    """How many weights were quantized."""
    return sum(site.n * site.k for site in program.plan.to_quantize())


def test_bits_go_where_the_model_loses_most() -> None:
    """Two layers of one shape: what the first gives is multiplied by 30, the second's by 0.03."""

    class TwoPaths(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return 30 * self.loud(x) + 0.03 * self.quiet(x)

    torch.manual_seed(0)
    x, model = torch.randn(50, 32), TwoPaths()
    program = auto(model, x, 5.0, group_size=8)
    assert {site.name: site.bits for site in program.plan} == {"loud": 8, "quiet": 2}
    uniform = qc.quantize_groups(qc.capture_model(model, (x,)), qc.QuantSpec(bits=4, group_size=8))
    errors = [squared_error(p, model, x) for p in (program, uniform)]
    assert errors[0] < 0.05 * errors[1]


def test_the_sensitivity_is_that_of_the_jacobian() -> None:
    """For one linear map after another, ‖J‖² is the squared norm of the second."""
    torch.manual_seed(0)
    first, last = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)
    model, x = torch.nn.Sequential(first, last), torch.randn(400, 5)
    annotated = qc.Pipeline.parse("annotate-linears")(
        qc.capture_model(model.double().eval(), (x.double(),))
    ).program
    found = measure_sensitivities(annotated, [(x.double(),)])
    second = last.weight.detach().square().sum()
    assert found["0"].gain == pytest.approx(400 * float(second) / 4, rel=0.1)
    assert found["1"].gain == pytest.approx(400, rel=0.1)
    assert found["0"].power == pytest.approx(float(x.square().sum()))
    assert found["0"].inputs == 2000


def test_padding_does_not_make_a_layer_sensitive() -> None:
    ids = token_ids(2, 8)
    model = llama()
    annotated = qc.Pipeline.parse("annotate-linears")(
        qc.capture_model(model, (ids, torch.ones_like(ids)))
    ).program
    head = "model.layers.1.mlp.down_proj"
    half = torch.ones_like(ids)
    half[:, 4:] = 0
    unmasked, masked = (
        measure_sensitivities(annotated, [(ids, mask)])[head].gain
        for mask in (torch.ones_like(ids), half)
    )
    assert masked == pytest.approx(unmasked / 2, rel=0.3)


def test_chosen_bits_are_saved_replayed_and_parsed(tmp_path: Path) -> None:
    model, ids = llama(), token_ids(2, 16)
    calls = (ids, torch.ones_like(ids))
    captured = qc.capture_model(model, calls)
    spec = qc.QuantSpec(bits="auto", budget=3.2, group_size=16, refine_offsets=False)
    program = qc.quantize_groups(captured, spec, calibration=[calls])
    rows = [(s.name, s.bits, s.group_size, s.why_bits) for s in program.plan]
    assert len({s.bits for s in program.plan.to_quantize()}) > 1
    program.save(tmp_path / "run")
    loaded = qc.Program.load(tmp_path / "run")
    assert [(s.name, s.bits, s.group_size, s.why_bits) for s in loaded.plan] == rows
    cached = replay(program, capture_causal_lm(skeleton_of(model)))
    assert [(s.name, s.bits, s.group_size, s.why_bits) for s in cached.plan] == rows
    again = qc.Pipeline.parse(",".join(program.history))(captured).program
    assert [s.bits for s in again.plan] == [s.bits for s in program.plan]
    assert_close(again(*calls).logits, program(*calls).logits, relative=1e-6)


def test_start_and_bits_chosen_together() -> None:
    """The start takes each weight's own bits and group."""
    torch.manual_seed(0)
    x, model = correlated(1000, 48), MLP(48, 24, 40, 6).double()
    quantized = by_hand(model, x, layers__0="2/8", layers__1="3/12")
    captured = qc.capture_model(model, (x,))
    spec = qc.AdapterSpec(rank=4, init="svd")
    adapted = qc.insert_adapters(quantized, spec, source=captured, calibration=[(x,)])
    errors = [squared_error(p, model, x) for p in (quantized, adapted)]
    assert errors[1] < 0.85 * errors[0]
    assert_close(qc.fold_adapters(adapted)(x), adapted(x), relative=1e-10)


# Faults


@pytest.mark.parametrize(
    ("budget", "unit", "least"),
    [
        (1.9, "bits", "the least is 2 bits"),
        (0.003, "megabytes", "the least is 0.0048 megabytes"),
        (9.0, "stored-bits", "the least is 10.0637 stored-bits"),
    ],
)
def test_a_budget_that_cannot_be_met_names_the_nearest(
    budget: float, unit: str, least: str
) -> None:
    with pytest.raises(UserInputError, match="is less than 2 bits") as caught:
        auto(MLP(48, 24, 40, 36, 6), torch.randn(4, 48), budget, budget_unit=unit, group_size=8)
    assert caught.value.hint == least


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from((None, None, 3))),
        min_size=1,
        max_size=60,
    ),
    unit=st.sampled_from(BUDGET_UNITS),
    group=st.integers(1, 300),
)
def test_the_budget_that_is_named_is_accepted_and_no_smaller_one(
    sizes: list[tuple[int, int, int | None]], unit: str, group: int
) -> None:
    sites = [SimpleNamespace(n=n, k=k, experts=experts, dtype="float32") for n, k, experts in sizes]

    def ask(budget: float) -> int:
        spec = qc.QuantSpec(bits="auto", budget=budget, budget_unit=unit, group_size=group)
        return budget_of(sites, spec)  # type: ignore[arg-type]

    with pytest.raises(UserInputError) as caught:
        ask(1e-9)
    named = str(caught.value.hint).split()[3]
    least = ask(float(named))
    assert least > 0
    with pytest.raises(UserInputError):
        ask(float(Decimal(named) - Decimal("0.0001")) or 1e-9)


def test_integer_zero_points_are_measured_as_they_are_stored() -> None:
    """Weights far from 0 lose much with integer zero-points, and nothing much with real ones."""

    class TwoReaders(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.far, self.near = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
            with torch.no_grad():
                self.far.weight.add_(2.0)
                self.near.weight.mul_(1.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.far(x) + self.near(x)

    torch.manual_seed(0)
    x, model = torch.randn(200, 64), TwoReaders()
    program = auto(model, x, 5.0, zero_point="integer")
    assert {site.path: site.bits for site in program.plan} == {"far": 8, "near": 2}
    real = auto(model, x, 5.0)
    assert {site.path: site.bits for site in real.plan} == {"far": 4, "near": 4}
    others = [
        by_integer_zero(model, x, far=far, near=near)
        for far, near in (("2/32", "8/32"), ("4/32", "4/32"), ("3/32", "4/32"))
    ]
    best = min(squared_error(other, model, x) for other in others)
    assert squared_error(program, model, x) < 0.6 * best


def by_integer_zero(model: torch.nn.Module, x: Tensor, **choices: str) -> qc.Program:
    """`by_hand` with integer zero-points."""
    texts = tuple(f"{path}={value}" for path, value in choices.items())
    steps = qc.Pipeline.parse("canonicalize-pointwise,annotate-linears").passes
    quantize = qc.Pipeline.parse("quantize-groups{zero-point=integer}").passes
    pipeline = qc.Pipeline([*steps, AssignBits(choices=texts), *quantize])
    return pipeline(qc.capture_model(model.eval(), (x,))).program


class Normalized(torch.nn.Module):
    """Rows divided by their length, whose gradient at a row of zeros is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 16, bias=False)
        self.last = torch.nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.last(h / ((h * h).sum(-1, keepdim=True).sqrt() + 1e-6))
        return y


def test_a_gradient_that_is_nan_is_refused_with_the_layer() -> None:
    x = torch.randn(8, 16)
    auto(Normalized(), x, 6.0, group_size=8)
    x[3] = 0
    with pytest.raises(UserInputError, match="gradient of the model's outputs") as caught:
        auto(Normalized(), x, 6.0, group_size=8)
    assert caught.value.where == "first"
    with pytest.raises(UserInputError, match="input on the calibration data is NaN") as caught:
        auto(Normalized(), torch.full((8, 16), math.nan), 6.0, group_size=8)
    assert caught.value.where == "first"


def test_a_model_without_layers_is_refused_as_with_other_bits() -> None:
    with pytest.raises(UserInputError, match="no linear layer"):
        auto(torch.nn.Sequential(torch.nn.LayerNorm(16)), torch.randn(2, 16), 6.0)


def test_outputs_that_depend_on_no_layer_are_refused() -> None:
    class Highest(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x), self.fc(x).argmax(-1)

    with pytest.raises(UserInputError, match="no output of the model depends"):
        auto(Highest(), torch.randn(2, 16), 6.0)


def test_auto_needs_calibration() -> None:
    captured = qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    with pytest.raises(PreconditionError, match="no bits were chosen") as caught:
        qc.quantize_groups(captured, qc.QuantSpec(bits="auto", budget=3.0))
    assert "calibration" in str(caught.value.hint)
    with pytest.raises(UserInputError, match="calibration data"):
        qc.quantize_groups(captured, qc.QuantSpec(bits="auto", budget=3.0), calibration=[])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("layers.9=4/32", "near ones: layers"),
        ("layers.0=5/32", "bits: one of"),
        ("layers.0=4", "bits/group_size"),
        ("layers.0=4/0", "bits/group_size"),
        ("layers.0", "path=value"),
    ],
)
def test_choices_that_make_no_sense_are_refused(choice: str, words: str) -> None:
    annotated = qc.Pipeline.parse("annotate-linears")(
        qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    ).program
    with pytest.raises(UserInputError) as caught:
        AssignBits(choices=(choice,))(annotated)
    assert words in str(caught.value.hint)


def test_weights_without_values_are_refused() -> None:
    model = llama()
    annotated = qc.Pipeline.parse("annotate-linears")(capture_causal_lm(skeleton_of(model))).program
    with pytest.raises(PreconditionError, match="not read yet"):
        choose_bits(annotated, qc.QuantSpec(bits="auto", budget=3.0), [])


def test_a_pass_that_forgets_its_choices_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    annotated = qc.Pipeline.parse("annotate-linears")(
        qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    ).program
    real = AssignBits.call

    def forgets(self: AssignBits, program: qc.Program) -> PassResult:
        done = real(self, program)
        kept = {s.name: {"chosen_bits": 4} for s in done.program.plan}
        plan = done.program.plan.update(kept)
        return dataclasses.replace(done, program=done.program.evolve(plan=plan))

    monkeypatch.setattr(AssignBits, "call", forgets)
    with pytest.raises(PostconditionError, match="other bits"):
        AssignBits(choices=("layers.0=3/16",))(annotated)

"""Adapters that train scales, offsets and codes: inserted, trained, folded, exported, refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from qalora_compile.ir.adapters import affine as adapters
from qalora_compile.ir.affine import expand_groups
from qalora_compile.ir.ops.affine_linear import STEP, affine_parameters, moved_codes
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.spec import AFFINE_LINEAR, validate
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.passes.insert_adapters import InsertAdapters
from qalora_compile.training.records.peft_adapters import save_peft
from tests.models import MLP, UsedTwice, bert, randomize_adapters, token_ids, worst

Golden = Callable[[str, str], None]
KINDS = ("affine", "qat")
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantized(model: nn.Module, x: Tensor, group: int = 16, bits: int = 4) -> qc.Program:
    spec = qc.QuantSpec(bits=bits, group_size=group)
    return qc.quantize_groups(qc.capture_model(model.eval(), (x,)), spec)


def adapted(
    kind: str, model: nn.Module, x: Tensor, pool: int | None = None, **options: Any
) -> qc.Program:
    spec = qc.AdapterSpec(rank=2, alpha=2.0, kind=kind, group_size=pool)
    return randomize_adapters(qc.insert_adapters(quantized(model, x, **options), spec))


@every_kind
def test_golden(kind: str, golden: Golden) -> None:
    program = quantized(MLP(16, 24, 8), torch.randn(2, 16), group=8)
    inserted = InsertAdapters(rank=2, alpha=3.0, kind=kind)(program).program
    golden(f"insert-adapters-{kind}", str(inserted))


@every_kind
def test_nothing_changes_at_the_start(kind: str) -> None:
    x = torch.randn(3, 20, dtype=torch.float64)
    before = quantized(MLP(20, 12, 5).double(), x)
    after = qc.insert_adapters(before, qc.AdapterSpec(rank=2, kind=kind))
    assert worst(after(x), before(x)) == 0.0
    assert all(site.rank == 2 for site in after.plan)


@given(
    kind=st.sampled_from(KINDS),
    k=st.integers(2, 40),
    group=st.integers(1, 20),
    times=st.integers(1, 3),
    bits=st.sampled_from((2, 3, 4, 8)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
@settings(max_examples=12, deadline=None)
def test_what_is_folded_is_what_was_trained_to_the_last_bit(
    kind: str, k: int, group: int, times: int, bits: int, dtype: torch.dtype
) -> None:
    """Over bits, groups, tails, wider pools and dtypes; and the certificate proves it."""
    x = torch.randn(4, k, dtype=dtype)
    model = MLP(k, 12, 5).to(dtype)
    program = adapted(kind, model, x, pool=times * group, group=group, bits=bits)
    folded = qc.fold_adapters(program)
    assert worst(folded(x), program(x)) == 0.0
    assert not dict(folded.named_adapter_parameters())
    same = [
        torch.equal(program.tensors()[f"{site.path}.qweight"], tensor)
        for site in folded.plan
        if (tensor := folded.tensors().get(f"{site.path}.qweight")) is not None
    ]
    assert all(same) == (kind == "affine")
    assert qc.prove_equivalence(program, folded).passed


def test_the_pooled_form_is_the_affine_one_without_gain() -> None:
    """Folded to the same numbers, bit for bit."""
    x = torch.randn(4, 32)
    base = quantized(MLP(32, 8), x)
    pooled, affine = (
        randomize_adapters(qc.insert_adapters(base, qc.AdapterSpec(rank=2, kind=kind)))
        for kind in ("lora", "affine")
    )
    with torch.no_grad():
        dict(affine.named_adapter_parameters())["layers.0.adapter_gain"].zero_()
    one, other = (qc.fold_adapters(program).tensors() for program in (pooled, affine))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_peqa_is_the_affine_one_without_update() -> None:
    """All scales move, and zero-points stay: also where they are integers."""
    x = torch.randn(4, 32, dtype=torch.float64)
    spec = qc.QuantSpec(bits=3, group_size=16, zero_point="integer")
    base = qc.quantize_groups(qc.capture_model(MLP(32, 8).double().eval(), (x,)), spec)
    program = randomize_adapters(qc.insert_adapters(base, qc.AdapterSpec(rank=2, kind="affine")))
    with torch.no_grad():
        dict(program.named_adapter_parameters())["layers.0.lora_B"].zero_()
    before, after = base.tensors(), qc.fold_adapters(program).tensors()
    old, new = (
        -tensors["layers.0.offset"] / tensors["layers.0.scale"] for tensors in (before, after)
    )
    torch.testing.assert_close(new, old, rtol=1e-12, atol=0)
    assert bool((after["layers.0.scale"] != before["layers.0.scale"]).all())


@every_kind
def test_training_lowers_the_loss_more_than_the_pooled_form(kind: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 32), torch.randn(64, 4)
    base, losses = quantized(MLP(32, 32, 4), x, bits=2), {}
    for name in ("lora", kind):
        program = qc.insert_adapters(base, qc.AdapterSpec(rank=4, kind=name))
        optimizer = torch.optim.AdamW(program.adapter_parameters(), lr=1e-2)
        for _ in range(60):
            loss = (program(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses[kind] < 0.95 * losses["lora"]


@every_kind
@pytest.mark.parametrize("target", ["ort", "ort-stock", "onnx"])
def test_exports_run_and_are_proved(kind: str, target: str, tmp_path: Path) -> None:
    x = torch.randn(5, 32)
    program = adapted(kind, MLP(32, 48, 16), x)
    folded, path = qc.fold_adapters(program), tmp_path / "model.onnx"
    qc.export_model(folded, path, qc.ExportSpec(target=target))
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


@every_kind
def test_the_svd_start_and_the_choice_of_ranks_serve_the_offsets(kind: str) -> None:
    x = torch.randn(64, 32)
    captured = qc.capture_model(MLP(32, 48, 16).eval(), (x,))
    base = qc.quantize_groups(captured, qc.QuantSpec(bits=2, group_size=8))
    spec = qc.AdapterSpec(rank="auto", rank_budget=400, init="svd")
    errors = {}
    for name in ("lora", kind):
        program = qc.insert_adapters(
            base, dataclasses.replace(spec, kind=name), source=captured, calibration=[(x,)]
        )
        errors[name] = (program(x) - captured(x)).square().mean().item()
    assert errors[kind] == pytest.approx(errors["lora"], rel=1e-4)
    assert errors[kind] < (base(x) - captured(x)).square().mean().item()


@given(
    k=st.integers(2, 40),
    group=st.integers(2, 20),
    bits=st.sampled_from((2, 3, 4, 8)),
    method=st.sampled_from(("minmax", "hqq")),
)
@settings(max_examples=10, deadline=None)
def test_codes_start_from_the_float_weights_and_change_nothing(
    k: int, group: int, bits: int, method: str
) -> None:
    """The latent weights are the float weights, unless those are nearer to another code."""
    x, model = torch.randn(3, k), MLP(k, 6)
    with torch.no_grad():
        model.get_parameter("layers.0.weight")[1] = 0.25  # groups of equal weights
    captured = qc.capture_model(model.eval(), (x,))
    base = qc.quantize_groups(captured, qc.QuantSpec(bits=bits, group_size=group, method=method))
    program = qc.insert_adapters(base, qc.AdapterSpec(rank=1, kind="qat"), source=captured)
    assert worst(program(x), base(x)) == 0.0
    qweight, scale, offset, shift = (
        program.tensors()[f"layers.0.{part}"].detach().double()
        for part in ("qweight", "scale", "offset", "adapter_shift")
    )
    codes = unpack_codes(qweight.byte(), bits, k)
    step, low = (expand_groups(part, group, k) for part in (scale, offset))
    weight = model.get_parameter("layers.0.weight").detach().double()
    latent = step * (codes + STEP * shift) + low
    near = (weight - (step * codes + low)).abs() < 0.48 * step
    torch.testing.assert_close(latent[near], weight[near], rtol=1e-4, atol=1e-6)
    assert bool(near.any())
    assert float((STEP * shift).abs().max()) <= 0.4901
    assert not bool(shift[1].any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_point": "integer"}, "zero_point is 'integer' with kind"),
        ({"dropout": 0.1}, "dropout is 0.1 with kind"),
    ],
)
@every_kind
def test_odd_specifications_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        qc.AdapterSpec(kind=kind, **options)


@every_kind
def test_experts_modules_and_peft_have_no_such_adapters(kind: str, tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    what = {"affine": "train scales", "qat": "train codes"}[kind]
    with pytest.raises(UnsupportedError, match=f"modules have no adapters that {what}"):
        qc.adapt_module_(MLP(32, 8), (x,), adapter=qc.AdapterSpec(kind=kind))
    program = adapted(kind, MLP(32, 8), x)
    with pytest.raises(UnsupportedError, match=f"PEFT has no adapters that {what}"):
        save_peft(program, tmp_path / "peft", pooling="sum")
    plan = program.plan.update({"layers.0": {"experts": 2}})
    base = dataclasses.replace(quantized(MLP(32, 8), x), plan=plan)
    with pytest.raises(PreconditionError, match=f"experts have only pooled .* '{kind}'"):
        InsertAdapters(kind=kind).requires(base)


@every_kind
def test_two_adapters_of_one_weight_do_not_fold(kind: str) -> None:
    program = adapted(kind, UsedTwice(32), torch.randn(2, 32))
    graph = program.copy_graph()
    first = next(n for n in graph.nodes if n.target is AFFINE_LINEAR)
    first.update_arg(12, 7.0)
    with pytest.raises(PreconditionError, match="two different adapters"):
        qc.fold_adapters(program.evolve(graph=graph))


@every_kind
def test_a_wrong_fold_is_found_by_number_and_by_proof(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 32)
    program = adapted(kind, MLP(32, 8), x)

    def kept_offset(scale: Tensor, offset: Tensor, *rest: Any) -> Any:
        """The factor is forgotten for the offset."""
        new, moved = affine_parameters(scale, offset, *rest)
        return new, moved - offset * rest[2]

    monkeypatch.setattr(adapters, "affine_parameters", kept_offset)
    wrong = qc.fold_adapters(program)
    assert not qc.verify_equivalence(program, wrong, [(x,)], qc.Tolerance(max_rel=1e-4)).passed
    assert not qc.prove_equivalence(program, wrong).passed


def test_codes_that_are_folded_one_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    program = adapted("qat", MLP(32, 8), torch.randn(4, 32))

    def off(qweight: Tensor, shift: Tensor, bits: int) -> Tensor:
        moved = moved_codes(qweight, shift, bits)
        moved[0, 0] ^= 1
        return moved

    monkeypatch.setattr(adapters, "moved_codes", off)
    assert not qc.prove_equivalence(program, qc.fold_adapters(program)).passed


def test_codes_may_change_only_where_they_trained() -> None:
    program = adapted("affine", MLP(32, 8), torch.randn(2, 32))
    folded = qc.fold_adapters(program)
    tensors = folded.tensors()
    tensors["layers.0.qweight"] = tensors["layers.0.qweight"] ^ 1
    wrong = folded.evolve(graph=folded.copy_graph(), tensors=tensors)
    with pytest.raises(PostconditionError, match="changed codes"):
        FoldAdapters().ensures(program, wrong)
    assert not qc.prove_equivalence(program, wrong).passed


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("lora_A", (2, 3), "do not chain"),
        ("adapter_gain", (8, 3), "do not fit"),
        ("adapter_shift", (8, 31), "do not fit"),
    ],
)
def test_shapes_are_validated(part: str, shape: tuple[int, int], message: str) -> None:
    program = adapted("qat", MLP(32, 8), torch.randn(2, 32))
    tensors = program.tensors()
    tensors[f"layers.0.{part}"] = nn.Parameter(torch.zeros(shape))
    with pytest.raises(InternalError, match=message):
        validate(program.evolve(graph=program.copy_graph(), tensors=tensors))

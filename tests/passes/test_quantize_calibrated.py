"""quantize-groups with calibration data: what it gains, what it reports, and running it again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.skeleton import skeleton_of
from qalora_compile.config import METHODS
from qalora_compile.errors import UserInputError
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.quantize_groups import QuantizeGroups
from qalora_compile.passes.recipes.replay import replay
from qalora_compile.quantizers.report import collecting_reports
from tests.models import MLP, ThreeReaders, UsedTwice, bert, llama, randomize_adapters, token_ids


def data(count: int, rows: int, k: int) -> list[tuple[Tensor]]:
    """Inputs whose columns go together."""
    mix = torch.randn(k // 2, k, generator=torch.Generator().manual_seed(1))
    return [(torch.randn(rows, k // 2) @ mix + 0.3,) for _ in range(count)]


def lost(model: nn.Module, program: qc.Program, x: Tensor) -> float:
    with torch.no_grad():
        return float((program(x) - model(x)).square().mean())


def test_on_a_complete_model_data_help_and_methods_stand_in_order() -> None:
    model = MLP(64, 96, 96, 32).eval()
    (calls, (held_out,)) = data(4, 256, 64), data(1, 256, 64)[0]
    captured = qc.capture_model(model, calls[0])
    blind, seen = {}, {}
    for method in METHODS:
        if method == "learned":
            continue  # it minimizes another loss (tests/training/learned)
        spec = qc.QuantSpec(bits=3, group_size=32, method=method)
        if method != "gptq":
            blind[method] = lost(model, qc.quantize_groups(captured, spec), held_out)
        program = qc.quantize_groups(captured, spec, calibration=calls)
        seen[method] = lost(model, program, held_out)
    assert all(seen[method] < blind[method] for method in blind)
    assert blind["mse"] < blind["minmax"]
    assert seen["gptq"] < 0.6 * min(value for method, value in seen.items() if method != "gptq")


def test_the_history_is_text_and_the_pass_is_read_back_without_data() -> None:
    calls = data(1, 64, 16)
    captured = qc.capture_model(MLP(16, 8).eval(), calls[0])
    spec = qc.QuantSpec(group_size=8, method="gptq")
    program = qc.quantize_groups(captured, spec, calibration=calls)
    (again,) = qc.Pipeline.parse(program.history[-1]).passes
    assert again == QuantizeGroups(group_size=8, method="gptq")
    assert again == QuantizeGroups(group_size=8, method="gptq", calibration=tuple(calls))
    assert "calibration" not in program.history[-1]
    with pytest.raises(UserInputError, match="no option 'calibration'"):
        qc.Pipeline.parse("quantize-groups{calibration=[1]}")


@pytest.fixture(scope="module")
def skeleton() -> qc.Program:
    return capture_causal_lm(skeleton_of(llama()))


@pytest.mark.slow
def test_a_calibrated_program_is_run_again_without_its_data(skeleton: qc.Program) -> None:
    ids = token_ids(2, 16)
    call = (ids, torch.ones_like(ids))
    captured = qc.capture_model(llama(), call)
    spec = qc.QuantSpec(method="gptq", bits=3)
    program = qc.quantize_groups(captured, spec, calibration=[call])
    program = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))
    cached = replay(program, skeleton)
    given = program.tensors()
    assert all(tensor is given[name] for name, tensor in cached.tensors().items())
    with pytest.raises(UserInputError, match="needs calibration data"):
        replay(program, captured)


def test_each_weight_is_reported_once() -> None:
    calls = data(2, 50, 32)
    captured = qc.capture_model(UsedTwice().eval(), calls[0])
    with collecting_reports() as reports:
        qc.quantize_groups(captured, qc.QuantSpec(method="mse", bits=2), calibration=calls)
    assert [(r.path, r.method, r.bits, r.group_size, r.rows) for r in reports] == [
        ("shared", "mse", 2, 32, 200),
        ("head", "mse", 2, 32, 100),
    ]
    for report in reports:
        assert 4 < report.weight_sqnr_db < 20
        assert report.output_sqnr_db is not None and report.output_sqnr_db > 4
        assert report.seconds > 0
    with collecting_reports() as reports:
        qc.quantize_groups(captured)
    assert [r.output_sqnr_db for r in reports] == [None, None]


def test_notes_are_among_the_changes() -> None:
    calls = data(1, 12, 64)
    annotated = AnnotateLinears()(qc.capture_model(ThreeReaders().eval(), calls[0])).program
    result = QuantizeGroups(method="gptq", calibration=tuple(calls))(annotated)
    assert {change.why for change in result.changes} == {
        "gptq; damping raised to 1; 12 input rows for 64 columns; "
        "12 input rows for 2 groups: offsets damped by 1.3"
    }


def test_experts_are_quantized_by_their_weights_and_that_is_said() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        use_cache=False,
    )
    ids = torch.randint(0, 64, (2, 8))
    captured = qc.capture_model(MixtralForCausalLM(config).eval(), (ids,))
    annotated = AnnotateLinears()(captured).program
    experts = [site for site in annotated.plan.to_quantize() if site.experts]
    assert experts
    with collecting_reports() as reports:
        result = QuantizeGroups(method="gptq", calibration=((ids,),))(annotated)
    skipped = [skip for skip in result.skips if skip.what == "not calibrated"]
    assert [skip.path for skip in skipped] == [site.name for site in experts]
    assert all(skip.why.endswith("hqq") for skip in skipped)
    methods = {report.path: report.method for report in reports}
    assert all(methods.pop(site.path) == "hqq" for site in experts)
    assert set(methods.values()) == {"gptq"}


@pytest.mark.parametrize("method", METHODS)
def test_calibration_without_a_call_is_refused(method: str) -> None:
    captured = qc.capture_model(MLP(8, 4).eval(), (torch.randn(2, 8),))
    with pytest.raises(UserInputError, match="no calibration data"):
        qc.quantize_groups(captured, qc.QuantSpec(method=method), calibration=[])


def test_a_model_that_computes_nan_is_refused_with_the_layer() -> None:
    model = MLP(8, 8, 4).eval()
    captured = qc.capture_model(model, (torch.randn(2, 8),))
    calls = [(torch.tensor([[0.0] * 7 + [float("inf")]]),)]
    with pytest.raises(UserInputError, match="NaN or infinite") as caught:
        qc.quantize_groups(captured, qc.QuantSpec(method="gptq"), calibration=calls)
    assert caught.value.where == "layers.0"


def test_weights_that_are_not_in_memory_cannot_be_calibrated(skeleton: qc.Program) -> None:
    with pytest.raises(UserInputError, match="not in memory"):
        qc.quantize_groups(skeleton, calibration=[(token_ids(1, 4),)])


def test_a_module_is_adapted_on_calibrated_codes() -> None:
    model, ids = bert(), token_ids(2, 8)
    before = copy.deepcopy(model)
    program = qc.adapt_module_(
        model, (ids,), quant=qc.QuantSpec(bits=8, method="gptq"), calibration=[(ids,)]
    )
    assert "method=gptq" in " ".join(program.history)
    with torch.no_grad():
        found, expected = model(ids).last_hidden_state, before(ids).last_hidden_state
    assert float((found - expected).abs().max()) < 0.1


def test_a_start_on_refined_offsets_says_that_little_is_left() -> None:
    calls = data(1, 400, 48)
    captured = qc.capture_model(MLP(48, 24, 40, 6).eval(), calls[0])
    said = {}
    for refine in (True, False):
        spec = qc.QuantSpec(bits=2, group_size=8, refine_offsets=refine)
        program = qc.quantize_groups(captured, spec, calibration=calls)
        for adapter in (
            qc.AdapterSpec(rank=2, init="svd"),
            qc.AdapterSpec(rank="auto", rank_budget=330),
        ):
            adapted = qc.insert_adapters(program, adapter, source=captured, calibration=calls)
            said[refine, adapter.init] = [n for n in adapted.notes if "refine_offsets=False" in n]
    assert len(said[True, "svd"]) == len(said[True, "zeros"]) == 1
    assert said[False, "svd"] == said[False, "zeros"] == []


def test_a_start_on_few_rows_says_so() -> None:
    calls = data(1, 6, 48)
    captured = qc.capture_model(MLP(48, 24, 40, 6).eval(), calls[0])
    program = qc.quantize_groups(captured, qc.QuantSpec(bits=2, group_size=8))
    adapter = qc.AdapterSpec(rank=2, init="svd")
    adapted = qc.insert_adapters(program, adapter, source=captured, calibration=calls)
    assert "adapters: 6 input rows for 6 groups: offsets damped by 8 (layers.0)" in adapted.notes
    assert not qc.insert_adapters(program, adapter, source=captured).notes

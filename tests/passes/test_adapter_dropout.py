"""Adapter dropout: at work in training, and nothing of it in evaluation, folded or exported."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.adapters.base import DROPOUT
from qalora_compile.ir.spec import validate
from tests.models import MLP, assert_close, llama, token_ids

SPEC = qc.AdapterSpec(rank=2, alpha=4.0, dropout=0.5)


def adapted(spec: qc.AdapterSpec = SPEC, dtype: torch.dtype = torch.float64) -> qc.Program:
    """A layer of 32 groups of 4, with an adapter that does something."""
    torch.manual_seed(0)
    x = torch.randn(2, 128, dtype=dtype)
    program = qc.capture_model(MLP(128, 6).to(dtype).eval(), (x,))
    program = qc.insert_adapters(qc.quantize_groups(program, qc.QuantSpec(group_size=4)), spec)
    for name, parameter in program.named_adapter_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    return program


def test_the_text_shows_it_between_sum_and_adapter() -> None:
    lines = str(adapted()).splitlines()
    (at,) = (i for i, line in enumerate(lines) if "aten.dropout" in line)
    assert "qalora.group_sum(%x, 4)" in lines[at - 1]
    assert lines[at].endswith("aten.dropout(%1, 0.5, False)")
    assert "qalora.pooled_adapter(%2," in lines[at + 1]


def test_training_drops_pooled_inputs_and_scales_the_others_up() -> None:
    program = adapted()
    x = torch.randn(3, 128, dtype=torch.float64)
    lora_a, lora_b = (p.detach() for p in program.adapter_parameters())
    without = program(x) - x.unflatten(-1, (32, 4)).sum(-1) @ lora_a.t() @ lora_b.t() * 2.0
    program.train()
    torch.manual_seed(5)
    y = program(x)
    torch.manual_seed(5)
    pooled = torch.nn.functional.dropout(x.unflatten(-1, (32, 4)).sum(-1), 0.5)
    assert (pooled == 0).any() and (pooled != 0).any()
    assert_close(y, without + pooled @ lora_a.t() @ lora_b.t() * 2.0, relative=1e-12)


def test_evaluation_folding_and_saving_are_those_without_dropout(tmp_path: Path) -> None:
    program, plain = adapted(), adapted(qc.AdapterSpec(rank=2, alpha=4.0))
    x = torch.randn(3, 128, dtype=torch.float64)
    program.train().eval()
    assert torch.equal(program(x), plain(x))
    folded = qc.fold_adapters(program)
    assert "dropout" not in str(folded)
    assert torch.equal(folded(x), qc.fold_adapters(plain)(x))
    assert str(qc.fold_adapters(program.train()).eval()) == str(folded)
    assert qc.prove_equivalence(program.eval(), folded).passed
    program.save(tmp_path / "program")
    loaded = qc.Program.load(tmp_path / "program")
    validate(loaded)
    assert str(loaded) == str(program)
    loaded.train()
    assert not torch.equal(loaded(x), program(x))


def test_adapters_put_into_a_program_in_training_drop_at_once() -> None:
    x = torch.randn(2, 16)
    program = qc.quantize_groups(qc.capture_model(MLP(16, 4).eval(), (x,)))
    inserted = qc.insert_adapters(program.train(), SPEC)
    (node,) = (n for n in inserted.graph.nodes if n.target is DROPOUT)
    assert node.args[2] is True


@pytest.mark.parametrize("target", ["ort", "ort-stock", "onnx"])
def test_an_export_with_adapters_holds_no_dropout(tmp_path: Path, target: str) -> None:
    program = adapted(dtype=torch.float32)
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target=target, allow_unfolded=True))
    assert "Dropout" not in {node.op_type for node in onnx.load(path).graph.node}
    x = torch.randn(3, 128)
    assert qc.verify_equivalence(program, path, [(x,)], qc.Tolerance(max_rel=1e-5)).passed


def test_adapted_modules_drop_in_training_alone() -> None:
    torch.manual_seed(0)
    model, ids = llama(), token_ids(2, 16)
    program = qc.adapt_module_(model.eval(), (ids,), {"use_cache": False}, adapter=SPEC)
    for name, parameter in program.named_adapter_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    calm = model(ids).logits
    assert_close(program(ids, use_cache=False)[0], calm, relative=1e-5)
    outputs = []
    for run in (model.train(), program.train()):  # the draws are the same, in the same order
        torch.manual_seed(3)
        outputs.append(run(ids, use_cache=False)[0])
    assert (outputs[0] - calm).abs().max() > 0.01
    assert_close(*outputs, relative=1e-5)
    with pytest.raises(UnsupportedError, match="past its layer"):
        _ = model.get_submodule("model.layers.0.self_attn.q_proj").weight


def test_a_module_that_takes_only_a_weight_is_refused() -> None:
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with pytest.raises(UnsupportedError, match="only takes a weight"):
        qc.adapt_module_(attention, (x, x, x), {"need_weights": False}, adapter=SPEC)


@pytest.mark.parametrize("variant", [{"kind": "scale"}, {"zero_point": "integer"}])
def test_adapters_that_keep_zero_points_integers_drop_nothing(variant: dict[str, str]) -> None:
    """They act on the weight, which has no input to drop."""
    with pytest.raises(UserInputError, match="dropout is 0.1 with integer zero-points"):
        qc.AdapterSpec(dropout=0.1, **variant)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan"), "much"])
def test_a_probability_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(UserInputError, match="dropout"):
        qc.AdapterSpec(dropout=dropout)

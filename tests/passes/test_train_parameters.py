"""train-parameters: a float head that trains with the adapters, is stored, folded, exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qalora_compile as qc
from qalora_compile.errors import (
    InternalError,
    PostconditionError,
    PreconditionError,
    UserInputError,
)
from qalora_compile.ir.program_record import ADAPTERS_FILE
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.ir.spec import validate
from qalora_compile.passes import train_parameters
from qalora_compile.passes.recipes.replay import replay
from qalora_compile.passes.train_parameters import TrainParameters
from tests.models import MLP, TiedHead, assert_close, randomize_adapters, worst

Golden = Callable[[str, str], None]
HEAD = "layers.2"


def adapted(model: nn.Module | None = None, train: str | tuple[str, ...] = ()) -> qc.Program:
    model = model or MLP(20, 12, 16, 5).double().eval()
    x = torch.randn(3, 20, dtype=torch.float64)
    program = qc.capture_model(model, (x,))
    program = qc.quantize_groups(program, qc.QuantSpec(group_size=8), exclude=(HEAD,))
    return qc.insert_adapters(program, qc.AdapterSpec(rank=2), train=train)


def train(program: qc.Program, steps: int = 5) -> None:
    x = torch.randn(16, 20, dtype=torch.float64)
    optimizer = torch.optim.SGD(program.adapter_parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (program(x) - 1).square().mean().backward()
        optimizer.step()


def test_golden(golden: Golden) -> None:
    golden("train-parameters", str(adapted(train=HEAD)))


def test_it_prints_and_parses() -> None:
    program = adapted(train=HEAD)
    assert program.history[-1] == "train-parameters{names=[layers.2]}"
    again = qc.Pipeline.parse(program.history[-1])(adapted()).program
    assert again.trained == program.trained == (f"{HEAD}.weight", f"{HEAD}.bias")


@given(
    names=st.lists(
        st.sampled_from([HEAD, f"{HEAD}.bias", "layers.1.bias", "bias", "*.bias", "re:2[.]w"]),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=10)
def test_nothing_changes_at_the_start_and_only_what_is_named_trains(names: list[str]) -> None:
    before = adapted()
    after = TrainParameters(names=tuple(names))(before).program
    x = torch.randn(4, 20, dtype=torch.float64)
    assert worst(before(x), after(x)) == 0.0
    new = {n for n, t in after.tensors().items() if t.requires_grad}
    new -= {n for n, t in before.tensors().items() if t.requires_grad}
    assert new == set(after.trained)
    biases = {f"layers.{i}.bias" for i in range(3)}
    meant = {
        HEAD: {f"{HEAD}.weight", f"{HEAD}.bias"},
        "bias": biases,
        "*.bias": biases,
        "re:2[.]w": {f"{HEAD}.weight"},
    }
    assert new == set().union(*(meant.get(name, {name}) for name in names))


def test_the_model_of_the_user_keeps_its_head() -> None:
    model = MLP(20, 12, 16, 5).double().eval()
    head = model.get_parameter("layers.2.weight")
    before = head.detach().clone()
    program = adapted(model, HEAD)
    train(program)
    assert torch.equal(head, before)
    assert not torch.equal(program.tensors()[f"{HEAD}.weight"], before)


def test_what_was_learned_is_stored_folded_and_exported(tmp_path: Path) -> None:
    x = torch.randn(4, 20)
    model = MLP(20, 12, 16, 5).eval()
    program = qc.capture_model(model, (x,))
    program = qc.quantize_groups(program, qc.QuantSpec(group_size=8), exclude=(HEAD,))
    program = randomize_adapters(qc.insert_adapters(program, train=HEAD))
    with torch.no_grad():
        program.tensors()[f"{HEAD}.bias"].add_(1.0)
    program.save(tmp_path / "run")
    names = load_tensors(tmp_path / "run" / ADAPTERS_FILE).keys()
    assert {f"{HEAD}.weight", f"{HEAD}.bias", "layers.0.lora_A"} <= names
    again = qc.Program.load(tmp_path / "run")
    assert again.trained == program.trained
    assert worst(again(x), program(x)) == 0.0
    assert all(p.requires_grad for p in again.adapter_parameters())
    folded = qc.fold_adapters(again)
    assert (folded.trained, folded.adapter_parameters()) == ((), [])
    assert not any(t.requires_grad for t in folded.tensors().values())
    assert_close(folded(x), program(x), relative=1e-5)
    qc.export_model(folded, tmp_path / "model.onnx")
    report = qc.verify_equivalence(
        program, tmp_path / "model.onnx", [(x,)], qc.Tolerance(max_rel=1e-5)
    )
    assert report.passed
    assert qc.prove_equivalence(folded, tmp_path / "model.onnx").passed


def test_another_capture_gets_the_trained_head() -> None:
    model = MLP(20, 12, 16, 5).double().eval()
    program = adapted(model, HEAD)
    train(program)
    other = replay(program, qc.capture_model(model, (torch.randn(2, 20, dtype=torch.float64),)))
    assert other.trained == program.trained
    assert all(
        p is dict(program.named_adapter_parameters())[n]
        for n, p in other.named_adapter_parameters()
    )
    folded = replay(
        qc.fold_adapters(program),
        qc.capture_model(model, (torch.randn(2, 20, dtype=torch.float64),)),
    )
    x = torch.randn(4, 20, dtype=torch.float64)
    assert_close(folded(x), program(x), relative=1e-12)
    assert folded.adapter_parameters() == []


def test_a_tied_parameter_stays_tied() -> None:
    ids = torch.randint(0, 48, (2, 5))
    program = qc.quantize_groups(qc.capture_model(TiedHead().eval(), (ids,)))
    (name,) = {n for n in program.tensors() if n in ("embed.weight", "lm_head.weight")}
    program = qc.insert_adapters(program, train=name)
    assert program.trained == (name,)
    with torch.no_grad():
        program.tensors()[name].zero_()
    read = [n for n in program.graph.nodes if n.op == "get_attr" and n.target == name]
    assert sum(len(node.users) for node in read) == 2
    assert not program(ids).any()


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(PreconditionError, match="trains through its adapter") as caught:
        adapted(train="layers.1")
    assert "exclude='layers.1'" in str(caught.value.hint)
    with pytest.raises(UserInputError, match="matches no parameter") as near:
        adapted(train="clasifier")
    assert "near names" in str(near.value.hint)
    with pytest.raises(UserInputError, match="no parameter to train"):
        TrainParameters()(adapted())
    with pytest.raises(PreconditionError, match="this one is folded"):
        TrainParameters(names=(HEAD,))(qc.fold_adapters(adapted()))
    program = adapted()
    tensors = program.tensors()
    part = tensors[f"{HEAD}.weight"].detach()[0]
    tensors["layers.1.bias"] = nn.Parameter(part, requires_grad=False)
    program = program.evolve(graph=program.copy_graph(), tensors=tensors)
    with pytest.raises(PreconditionError, match=r"shares memory with another, layers\.1\.bias"):
        TrainParameters(names=(HEAD,))(program)


def test_a_parameter_that_was_not_set_free_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nothing is set free; then a head that trains though nobody said so."""
    monkeypatch.setattr(train_parameters, "set_free", lambda tensors, names: dict(tensors))
    with pytest.raises(PostconditionError, match="does not train"):
        adapted(train=HEAD)
    program = adapted()
    program.tensors()[f"{HEAD}.bias"].requires_grad_(True)
    with pytest.raises(InternalError, match=r"layers\.2\.bias is trainable"):
        validate(program)

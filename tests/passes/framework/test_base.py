"""The contract around every pass: what it may take, what it may touch, and how it fails."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.errors import (
    InternalError,
    PassError,
    PostconditionError,
    PreconditionError,
    QaloraError,
    UserInputError,
)
from qalora_compile.ir.stages import ADAPTED, ANNOTATED, FLOAT, FOLDED, QUANTIZED, STAGES
from qalora_compile.passes import Change, Pass, PassResult, Pipeline, available_passes, get_pass
from qalora_compile.passes.framework import base
from qalora_compile.passes.framework.base import validating
from tests.models import MLP, adapted, worst

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@functools.cache
def captured() -> qc.Program:
    return qc.capture_model(MLP(16, 8, 4).eval(), (X,))


def at_stage(stage: str) -> qc.Program:
    """A program of the tiny model at any stage."""
    if stage == FLOAT:
        return captured()
    if stage == ANNOTATED:
        return get_pass("annotate-linears")(captured()).program
    if stage == QUANTIZED:
        return qc.quantize_groups(captured(), qc.QuantSpec(group_size=8))
    trained = adapted(MLP(16, 8, 4).eval(), (X,), qc.QuantSpec(group_size=8))
    return trained if stage == ADAPTED else qc.fold_adapters(trained)


def copied(program: qc.Program) -> PassResult:
    """What a pass that does nothing returns."""
    return PassResult(program.evolve(graph=program.copy_graph()))


@dataclass(frozen=True, kw_only=True)
class Scripted(Pass):
    """A pass made of three functions, which keeps a diary of what each of them saw."""

    name: ClassVar[str] = "scripted"
    consumes: ClassVar[tuple[str, ...]] = STAGES
    produces: ClassVar[str | None] = None

    before: Callable[[qc.Program], None] = lambda program: None
    work: Callable[[qc.Program], PassResult] = copied
    after: Callable[[qc.Program, qc.Program], None] = lambda before, after: None
    diary: list[tuple[str, tuple[qc.Program, ...]]] = field(default_factory=list)

    def requires(self, program: qc.Program) -> None:
        self.diary.append(("requires", (program,)))
        self.before(program)

    def call(self, program: qc.Program) -> PassResult:
        self.diary.append(("call", (program,)))
        return self.work(program)

    def ensures(self, before: qc.Program, after: qc.Program) -> None:
        self.diary.append(("ensures", (before, after)))
        self.after(before, after)

    def __str__(self) -> str:
        return self.name


class Finisher(Scripted):
    """The same, with a stage of its own."""

    name: ClassVar[str] = "finisher"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT,)
    produces: ClassVar[str | None] = ANNOTATED


def test_requires_sees_the_input_and_ensures_the_finished_result() -> None:
    program, step = captured(), Scripted()
    result = step(program)
    assert [what for what, _ in step.diary] == ["requires", "call", "ensures"]
    assert step.diary[0][1][0] is program
    assert step.diary[1][1][0] is program
    before, after = step.diary[2][1]
    assert before is program
    assert after is result.program
    assert after.history == ("scripted",)


def test_ensures_sees_the_stage_that_the_pass_produces() -> None:
    step = Finisher(work=get_pass("annotate-linears").call)
    result = step(captured())
    assert step.diary[-1][1][1].stage == ANNOTATED
    assert result.program.stage == ANNOTATED
    assert result.program.history == ("finisher",)


def test_what_the_pass_reports_survives() -> None:
    done, left = Change("a", "made", "why"), Change("b", "left")

    def work(program: qc.Program) -> PassResult:
        return PassResult(copied(program).program, (done,), (left,))

    result = Scripted(work=work)(captured())
    assert (result.changes, result.skips) == ((done,), (left,))
    assert result.modified
    assert not Scripted()(captured()).modified


def test_a_wrong_stage_stops_a_pass_before_it_looks() -> None:
    step = Finisher()
    with pytest.raises(PreconditionError, match="finisher takes a program at stage float") as error:
        step(at_stage(QUANTIZED))
    assert step.diary == []
    assert error.value.pass_name == "finisher"


FUSING = (
    "fuse-rms-norm",
    "fuse-rotary",
    "fuse-attention",
    "fuse-skip-norm",
    "fuse-multi-head",
)
STEPS = {
    "canonicalize-complex": {FLOAT},
    "canonicalize-clamps": {FLOAT},
    "canonicalize-pointwise": {FLOAT},
    "annotate-linears": {FLOAT, ANNOTATED},
    "quantize-groups": {ANNOTATED},
    "assign-bits": {ANNOTATED},
    "sort-columns": {ANNOTATED},
    "quantize-embeddings": {QUANTIZED, ADAPTED, FOLDED},
    "split-planes": {QUANTIZED, ADAPTED, FOLDED},
    "insert-adapters": {QUANTIZED},
    "fold-adapters": {ADAPTED},
    "dequantize-groups": {QUANTIZED, FOLDED},
    "share-group-sums": {ADAPTED},
    "train-parameters": {ADAPTED},
    "widen-halves": {FLOAT, ANNOTATED, QUANTIZED, ADAPTED, FOLDED},
    "pool-tokens": set(STAGES),
    **{name: set(STAGES) for name in FUSING},
    "legalize-ort": {QUANTIZED, ADAPTED, FOLDED},
    "legalize-ort-stock": {QUANTIZED, ADAPTED, FOLDED},
    "legalize-onnx": {QUANTIZED, ADAPTED, FOLDED},
    "legalize-openvino": {QUANTIZED, ADAPTED, FOLDED},
    "legalize-torch": {QUANTIZED, ADAPTED, FOLDED},
    "legalize-coreml": {QUANTIZED, ADAPTED, FOLDED},
    "fuse-shared-input": set(),
}


OPTIONS: dict[str, dict[str, Any]] = {
    "quantize-groups": {"group_size": 8},
    "train-parameters": {"names": ("bias",)},
}


@pytest.mark.parametrize("stage", STAGES)
def test_each_pass_takes_its_stages_and_refuses_the_others(stage: str) -> None:
    program = at_stage(stage)
    assert set(STEPS) == set(available_passes())
    for name, good in STEPS.items():
        step = get_pass(name, OPTIONS.get(name))
        if stage in good:
            wanted = step.produces or stage
            assert step(program).program.stage == wanted, name
            continue
        with pytest.raises(PreconditionError) as error:
            step(program)
        assert error.value.pass_name == name
        assert f"this one is {stage}" in str(error.value)
        assert error.value.hint, f"{name} on {stage} does not say what to do"


@pytest.mark.parametrize("stage", STAGES)
def test_no_pass_touches_its_input(stage: str) -> None:
    program = at_stage(stage)
    text, values = str(program), program(X)
    kept = {n: (t, t.clone(), t.requires_grad) for n, t in program.tensors().items()}
    fitting = [get_pass(name, OPTIONS.get(name)) for name in STEPS if stage in STEPS[name]]
    for step in fitting:
        step(program)
    assert fitting
    assert str(program) == text
    assert worst(program(X), values) == 0.0
    for name, tensor in program.tensors().items():
        first, copy, trainable = kept[name]
        assert tensor is first
        assert torch.equal(tensor, copy)
        assert tensor.requires_grad == trainable


def first_call(program: qc.Program) -> fx.Node:
    return next(n for n in program.graph.nodes if n.op == "call_function")


def add_a_node(program: qc.Program) -> None:
    node = first_call(program)
    with program.graph.inserting_after(node):
        program.graph.call_function(torch.ops.aten.neg.default, (node,))


def swap_an_operator(program: qc.Program) -> None:
    tanh = next(n for n in program.graph.nodes if n.target is torch.ops.aten.tanh.default)
    tanh.target = torch.ops.aten.relu.default


def rewire_a_node(program: qc.Program) -> None:
    linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    linears[0].args = linears[0].args[:2]


def write_into_a_weight(program: qc.Program) -> None:
    with torch.no_grad():
        program.tensors()["layers.0.weight"][0, 0] += 1


def freeze_a_weight(program: qc.Program) -> None:
    program.tensors()["layers.0.weight"].requires_grad_(False)


@pytest.mark.parametrize(
    "edit",
    [add_a_node, swap_an_operator, rewire_a_node, write_into_a_weight, freeze_a_weight],
    ids=lambda f: f.__name__,
)
def test_a_pass_that_edits_its_input_is_exposed(edit: Callable[[qc.Program], None]) -> None:
    def work(program: qc.Program) -> PassResult:
        result = copied(program)
        edit(program)
        return result

    with pytest.raises(InternalError, match="scripted changed its input"):
        Scripted(work=work)(qc.capture_model(MLP(16, 8, 4).eval(), (X,)))


def test_a_pass_that_hands_its_input_back_is_exposed() -> None:
    with pytest.raises(InternalError, match="scripted changed its input"):
        Scripted(work=PassResult)(captured())


def fails(error: Exception) -> Callable[..., None]:
    def fail(*programs: qc.Program) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["before", "work", "after"])
@pytest.mark.parametrize("error", [KeyError("gone"), RuntimeError("boom"), AssertionError("odd")])
def test_any_other_exception_becomes_an_internal_error(where: str, error: Exception) -> None:
    step = Scripted(**{where: fails(error)})  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="the pass scripted failed") as caught:
        step(captured())
    assert caught.value.__cause__ is error
    assert type(error).__name__ in caught.value.what
    assert str(error) in caught.value.what
    assert "report" in str(caught.value.hint)


@pytest.mark.parametrize("where", ["before", "work", "after"])
@pytest.mark.parametrize(
    "error",
    [PreconditionError("no"), PostconditionError("no"), UserInputError("no"), InternalError("no")],
    ids=lambda e: type(e).__name__,
)
def test_our_own_errors_pass_through_as_they_are(where: str, error: QaloraError) -> None:
    step = Scripted(**{where: fails(error)})  # type: ignore[arg-type]
    with pytest.raises(type(error)) as caught:
        step(captured())
    assert caught.value is error
    if isinstance(error, PassError):
        assert error.pass_name == "scripted"


def test_a_name_that_an_error_already_carries_is_kept() -> None:
    inner = PreconditionError("no", pass_name="inner")
    with pytest.raises(PreconditionError) as caught:
        Scripted(before=fails(inner))(captured())
    assert caught.value.pass_name == "inner"


def test_an_interrupt_is_not_wrapped() -> None:
    def interrupt(program: qc.Program) -> PassResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scripted(work=interrupt)(captured())


def test_a_pipeline_tells_which_passes_had_run() -> None:
    fine, bad = Scripted(), Scripted(after=fails(PostconditionError("broken promise")))
    with pytest.raises(PostconditionError) as caught:
        Pipeline([fine, fine, bad, fine])(captured())
    assert caught.value.pass_name == "scripted"
    assert caught.value.already_run == ("scripted", "scripted")
    lines = str(caught.value).splitlines()
    assert lines[0] == "broken promise"
    assert lines[-2:] == ["  pass:  scripted", "  after: scripted, scripted"]
    assert len(fine.diary) == 2 * 3, "the pass behind the failure did not start"


def illegal_operator(program: qc.Program) -> PassResult:
    """A result that its stage forbids: a group-sum in a float program."""
    graph = program.copy_graph()
    x = next(n for n in graph.nodes if n.op == "placeholder")
    call = next(n for n in graph.nodes if n.op == "call_function")
    with graph.inserting_before(call):
        graph.call_function(torch.ops.qalora.group_sum.default, (x, 8))
    return PassResult(program.evolve(graph=graph))


def test_validation_sees_input_and_result_and_can_be_switched_off() -> None:
    with pytest.raises(InternalError, match="not legal at stage float"):
        Scripted(work=illegal_operator)(captured())
    with validating(False):
        broken = Scripted(work=illegal_operator)(captured()).program
        with validating(), pytest.raises(InternalError, match="not legal at stage float"):
            Scripted()(broken)
        assert Scripted()(broken).program.stage == FLOAT, "the inner block restored the outer one"


def test_the_switch_is_restored_after_an_error() -> None:
    with validating(False):
        with pytest.raises(ZeroDivisionError), validating():
            raise ZeroDivisionError
        assert base._validating.get() is False


def test_a_base_that_became_trainable_is_caught() -> None:
    def thaw(program: qc.Program) -> PassResult:
        tensors: dict[str, Tensor] = program.tensors()
        tensors["layers.0.bias"] = nn.Parameter(tensors["layers.0.bias"].detach().clone())
        return PassResult(program.evolve(graph=program.copy_graph(), tensors=tensors))

    with pytest.raises(InternalError, match=r"layers\.0\.bias is trainable"):
        Scripted(work=thaw)(at_stage(QUANTIZED))


NOT_TEXT = {"calibration", "checkpoints", "orders", "stored"}
"""Fields of passes that a pipeline's text cannot carry."""


def test_passes_are_values() -> None:
    for name in available_passes():
        step = get_pass(name)
        assert step == get_pass(name)
        assert hash(step) == hash(get_pass(name))
        field_names = [f.name for f in dataclasses.fields(step)]
        assert list(step.options()) == step.option_names()
        assert set(field_names) - set(step.option_names()) <= NOT_TEXT
        with pytest.raises(dataclasses.FrozenInstanceError):
            step.name = "other"  # type: ignore[misc]


def test_a_pass_without_work_cannot_be_made() -> None:
    class Idle(Pass):
        name: ClassVar[str] = "idle"
        consumes: ClassVar[tuple[str, ...]] = (FLOAT,)
        produces: ClassVar[str | None] = None

    with pytest.raises(TypeError, match="abstract"):
        Idle()  # type: ignore[abstract]

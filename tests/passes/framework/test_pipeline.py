"""Pipelines, their text, and the pass contract."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qalora_compile as qc
from qalora_compile.errors import (
    InternalError,
    PassError,
    PostconditionError,
    PreconditionError,
    UserInputError,
)
from qalora_compile.ir.stages import FLOAT, STAGES
from qalora_compile.passes import Pass, PassResult, Pipeline, available_passes, get_pass
from qalora_compile.passes.framework.pipeline_text import format_pass, parse_passes
from tests.models import MLP, assert_close, worst

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
TEXT = "annotate-linears,quantize-groups{bits=4,group-size=8},insert-adapters{rank=2}"


def program() -> qc.Program:
    return qc.capture_model(MLP(16, 8, 4).eval(), (X,))


def test_a_pipeline_from_text_equals_the_functions() -> None:
    captured = program()
    result = Pipeline.parse(TEXT)(captured)
    by_hand = qc.quantize_groups(captured, qc.QuantSpec(group_size=8))
    by_hand = qc.insert_adapters(by_hand, qc.AdapterSpec(rank=2))
    assert_close(result.program(X), by_hand(X), relative=1e-12)
    assert {c.path for c in result.changes} == {"layers.0", "layers.1"}


def test_the_history_replays() -> None:
    captured = program()
    once = Pipeline.parse(TEXT)(captured).program
    again = Pipeline.parse(",".join(once.history))(captured).program
    assert str(again) == str(once)
    assert worst(again(X), once(X)) == 0.0


@pytest.mark.parametrize("name", available_passes())
def test_every_pass_prints_and_parses(name: str) -> None:
    step = get_pass(name)
    (again,) = Pipeline.parse(str(step)).passes
    assert again == step
    assert step.name == name
    assert step.__doc__ is not None
    for part in ("Before:", "After:", "Fires on:", "Leaves alone", "Exactness:"):
        assert part in step.__doc__, f"{name} does not say {part}"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_]{0,8}[a-z]", fullmatch=True),
        st.one_of(VALUES, st.lists(VALUES, max_size=3).map(tuple)),
        max_size=4,
    )
)
def test_option_text_round_trips(options: dict[str, object]) -> None:
    ((name, again),) = parse_passes(format_pass("some-pass", options))
    assert name == "some-pass"
    assert again == options
    assert {k: type(v) for k, v in again.items()} == {k: type(v) for k, v in options.items()}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "quantize-groups{bits=4",
        "quantize-groups{bits}",
        "a,,b",
        "fold-adapters}",
        '{"x"}',
        "quantize-groups{bits=2,bits=8}",
        "a{b=" + "[" * 5000,
        'annotate-linears{targets=["a}',
        "quantize-groups{bits=}",
        "fold-adapters extra",
    ],
)
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(UserInputError):
        Pipeline.parse(text)


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UserInputError) as caught:
        Pipeline.parse("quantise-groups")
    assert "did you mean quantize-groups" in str(caught.value)
    with pytest.raises(UserInputError) as caught:
        Pipeline.parse("quantize-groups{width=4}")
    assert "group-size" in str(caught.value)


def test_numbers_name_layers_of_a_sequential() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    captured = qc.capture_model(model.eval(), (X,))
    plan = Pipeline.parse("annotate-linears{exclude=[2]}")(captured).program.plan
    assert plan["2"].reason == "excluded"
    assert plan["0"].decision == "quantize"
    for text in ("annotate-linears{exclude=[true]}", "annotate-linears{targets=none}"):
        with pytest.raises(UserInputError, match="give names of layers|holds"):
            Pipeline.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "quantize-groups,annotate-linears",
        "annotate-linears,fold-adapters",
        "fold-adapters,insert-adapters",
        "legalize-ort-stock,fold-adapters",
        "annotate-linears,share-group-sums",
    ],
)
def test_an_impossible_order_is_refused_at_construction(text: str) -> None:
    with pytest.raises(PreconditionError, match="cannot follow"):
        Pipeline.parse(text)


def test_an_error_names_the_pass_and_those_already_run() -> None:
    pipeline = Pipeline.parse(
        "annotate-linears,quantize-groups{group-size=8},insert-adapters{group-size=4}"
    )
    with pytest.raises(PassError) as caught:
        pipeline(program())
    assert caught.value.pass_name == "insert-adapters"
    assert caught.value.already_run == ("annotate-linears", "quantize-groups")
    assert "after: annotate-linears, quantize-groups" in str(caught.value)


def test_the_observer_sees_every_step() -> None:
    seen: list[tuple[str, str]] = []
    pipeline = Pipeline.parse(TEXT)
    pipeline(program(), observer=lambda p, r: seen.append((p.name, r.program.stage)))
    assert seen == [
        ("annotate-linears", "annotated"),
        ("quantize-groups", "quantized"),
        ("insert-adapters", "adapted"),
    ]


@dataclass(frozen=True, kw_only=True)
class Probe(Pass):
    """A pass whose behaviour the tests choose."""

    name: ClassVar[str] = "probe"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT,)
    produces: ClassVar[str | None] = None

    how: str = "good"

    def requires(self, program: qc.Program) -> None:
        if self.how == "refuses":
            raise PreconditionError("no")

    def call(self, program: qc.Program) -> PassResult:
        if self.how == "raises":
            raise KeyError("lost")
        if self.how == "edits the graph":
            program.graph.create_node("call_function", torch.ops.aten.neg.default, (1,))
        if self.how == "edits a tensor":
            next(iter(program.tensors().values())).data.add_(0)
            next(iter(program.tensors().values())).detach().add_(0)
        if self.how == "returns its input":
            return PassResult(program)
        after = program.evolve(graph=program.copy_graph())
        return PassResult(dataclasses.replace(after, notes=("made by probe",)))

    def ensures(self, before: qc.Program, after: qc.Program) -> None:
        if after.notes != ("made by probe",) or before.notes:
            raise PostconditionError("ensures saw the wrong program")
        if self.how == "breaks its promise":
            raise PostconditionError("broken")


def test_ensures_sees_the_result_and_requires_the_input() -> None:
    result = Probe()(program())
    assert result.program.history == ("probe{how=good}",)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("refuses", PreconditionError),
        ("raises", InternalError),
        ("edits the graph", InternalError),
        ("edits a tensor", InternalError),
        ("returns its input", InternalError),
        ("breaks its promise", PostconditionError),
    ],
)
def test_a_pass_that_breaks_the_contract_is_stopped(how: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Probe(how=how)(program())


def test_a_stage_that_no_pass_takes_is_named() -> None:
    adapted = Pipeline.parse(TEXT)(program()).program
    with pytest.raises(PreconditionError, match="takes a program at stage float, this one is adap"):
        Probe()(adapted)
    assert set(STAGES) >= {FLOAT, adapted.stage}

"""Every pass of this package keeps the contract of passes, and a pass that breaks it is named."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import qalora_compile as qc
from qalora_compile import extend
from qalora_compile.config import AdapterSpec, QuantSpec
from qalora_compile.errors import PreconditionError
from qalora_compile.ir.stages import FLOAT
from qalora_compile.passes import available_passes, get_pass
from qalora_compile.testing import ContractError, check_pass
from tests.models import MLP, ThreeReaders, TiedHead, adapted, llama, token_ids

X = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
QUANT = QuantSpec(group_size=8)


def _tied() -> qc.Program:
    captured = qc.capture_model(TiedHead().eval(), (torch.randint(0, 48, (2, 5)),))
    return qc.quantize_groups(captured, QUANT)


def _tokens() -> qc.Program:
    return qc.capture_model(llama(num_hidden_layers=1), (token_ids(2, 8),))


def _fused() -> qc.Program:
    steps = qc.Pipeline.parse("fuse-rms-norm,fuse-rotary,fuse-attention")
    return steps(at_stage("tokens")).program


def _shared() -> qc.Program:
    program = qc.quantize_groups(qc.capture_model(ThreeReaders().eval(), (torch.randn(2, 64),)))
    return get_pass("legalize-ort")(program).program


_OTHERS: dict[str, Callable[[], qc.Program]] = {
    "tied": _tied,
    "tokens": _tokens,
    "fused": _fused,
    "shared": _shared,
}


@functools.cache
def at_stage(stage: str) -> qc.Program:
    """A program with a tail group, at a stage, or one of `_OTHERS`."""
    torch.manual_seed(0)
    if stage in _OTHERS:
        return _OTHERS[stage]()
    captured = qc.capture_model(MLP(20, 8, 4).eval(), (X,))
    if stage == FLOAT:
        return captured
    if stage == "annotated":
        return get_pass("annotate-linears")(captured).program
    if stage == "quantized":
        return qc.quantize_groups(captured, QUANT)
    trained = adapted(MLP(20, 8, 4).eval(), (X,), QUANT, AdapterSpec(rank=2))
    return trained if stage == "adapted" else qc.fold_adapters(trained)


WHERE: dict[str, str] = {
    **dict.fromkeys(("canonicalize-complex", "canonicalize-clamps"), FLOAT),
    **dict.fromkeys(("canonicalize-pointwise", "annotate-linears"), FLOAT),
    **dict.fromkeys(("sort-columns", "assign-bits", "quantize-groups"), "annotated"),
    "quantize-embeddings": "tied",
    "insert-adapters": "quantized",
    **dict.fromkeys(("train-parameters", "fold-adapters", "share-group-sums"), "adapted"),
    **dict.fromkeys(("fuse-rms-norm", "fuse-rotary", "fuse-attention"), "tokens"),
    **dict.fromkeys(("fuse-skip-norm", "fuse-multi-head"), "fused"),
    "pool-tokens": FLOAT,
    "fuse-shared-input": "shared",
}
"""Where each pass is tried; the others take a folded program."""
OPTIONS: dict[str, dict[str, Any]] = {
    "quantize-groups": {"group_size": 8},
    "train-parameters": {"names": ("bias",)},
    "insert-adapters": {"rank": 2},
    "assign-bits": {"choices": ("layers.0=2/8",)},
}
IDEMPOTENT = (
    *("canonicalize-complex", "canonicalize-clamps", "canonicalize-pointwise"),
    *("widen-halves", "fuse-rms-norm", "fuse-rotary", "fuse-attention", "share-group-sums"),
    "fuse-shared-input",
)


@pytest.mark.parametrize("name", available_passes())
def test_every_pass_keeps_the_contract(name: str) -> None:
    step = get_pass(name, OPTIONS.get(name))
    check_pass(
        step,
        at_stage(WHERE.get(name, "folded")),
        idempotent=name in IDEMPOTENT,
        captured=at_stage(FLOAT) if WHERE.get(name) in (FLOAT, "annotated") else None,
    )


# Planted faults: a pass that breaks a clause, and the clause that has to be named.


@dataclass(frozen=True, kw_only=True)
class Planted(extend.Pass):
    """Doubles the biases, or does what a fault says."""

    name: ClassVar[str] = "planted"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT,)
    produces: ClassVar[str | None] = None

    fault: str = ""

    def call(self, program: qc.Program) -> extend.PassResult:
        """Do it."""
        tensors = program.tensors()
        if self.fault == "random":
            tensors["layers.0.bias"] = nn.Parameter(torch.randn(8))
        if self.fault == "function":
            tensors["layers.0.bias"] = nn.Parameter(tensors["layers.0.bias"].detach() * 1.001)
        if self.fault == "purity":
            tensors["layers.0.bias"].data.add_(1.0)
        if self.fault == "raises":
            raise KeyError("lost")
        changed = self.fault != "silent" or program.history
        if self.fault == "silent":
            tensors["layers.0.bias"] = nn.Parameter(tensors["layers.0.bias"].detach() * 0)
        after = program.evolve(graph=program.copy_graph(), tensors=tensors)
        if self.fault == "memory":
            _seen.append(0)
            tensors["layers.0.bias"] = nn.Parameter(torch.full((8,), float(len(_seen))))
            after = after.evolve(graph=program.copy_graph(), tensors=tensors)
        changes = (extend.Change("layers.0", "planted"),) if changed and self.fault else ()
        return extend.PassResult(after, changes)


_seen: list[int] = []


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with extend.scoped():
        extend.register_pass(Planted)
        yield


def test_a_pass_that_does_nothing_keeps_it() -> None:
    check_pass(Planted(), at_stage(FLOAT), idempotent=True, captured=at_stage(FLOAT))


@pytest.mark.parametrize(
    ("fault", "clause"),
    [
        ("random", "determinism"),
        ("memory", "determinism"),
        ("function", "function: the outputs in float64"),
        ("purity", "purity|validity"),
        ("raises", "validity: the pass runs"),
        ("silent", "honesty"),
    ],
)
def test_a_pass_that_breaks_a_clause_is_named(fault: str, clause: str) -> None:
    program = qc.capture_model(MLP(20, 8, 4).eval(), (X,))
    with pytest.raises(ContractError, match=f"the pass planted breaks.*\n  clause: ({clause})"):
        check_pass(Planted(fault=fault), program)


def test_what_is_not_idempotent_is_named() -> None:
    with pytest.raises(ContractError, match="clause: idempotence"):
        check_pass(Planted(fault="function"), at_stage(FLOAT), exact=False, idempotent=True)


def test_a_wrong_stage_is_named() -> None:
    with pytest.raises(ContractError, match="clause: stages: the program given"):
        check_pass(Planted(), at_stage("folded"))


def check_kind(kind: type[extend.Pass]) -> str:
    """The clause that a class of passes breaks."""
    with extend.scoped():
        with pytest.raises(ContractError) as caught:
            extend.register_pass(kind)
            check_pass(kind(), at_stage(FLOAT))
        return caught.value.clause


def test_passes_that_are_no_values_are_named() -> None:
    class Unhashable(Planted):
        """It is no value."""

        name: ClassVar[str] = "unhashable"
        __hash__ = None  # type: ignore[assignment]

    @dataclass(frozen=True, kw_only=True)
    class Mute(Planted):
        name: ClassVar[str] = "mute"

    @dataclass(frozen=True, kw_only=True)
    class Forgetful(Planted):
        """Its options are not printed."""

        name: ClassVar[str] = "forgetful"
        fault: str = "function"

        def options(self) -> dict[str, Any]:
            return {"fault": ""}

    @dataclass(frozen=True, kw_only=True)
    class Hungry(Planted):
        """It takes every stage and dies on those that it does not know."""

        name: ClassVar[str] = "hungry"

        def _run(self, program: qc.Program) -> extend.PassResult:
            if program.stage != FLOAT:
                raise KeyError(program.stage)
            return super()._run(program)

    Mute.__doc__ = None
    assert check_kind(Unhashable).startswith("text: the pass is a frozen dataclass")
    assert check_kind(Mute).startswith("text: the pass is a frozen dataclass")
    assert check_kind(Forgetful).startswith("text: the pass is known")
    assert check_kind(Hungry).startswith("stages: a program at stage")


def test_an_error_of_the_contract_says_what_was_found() -> None:
    error = ContractError("the pass x", "purity: it stays", "it changed")
    assert str(error).splitlines() == [
        "the pass x breaks its contract",
        "  clause: purity: it stays",
        "  found:  it changed",
    ]
    assert (error.subject, error.clause) == ("the pass x", "purity: it stays")
    assert (error.why, isinstance(error, AssertionError)) == ("it changed", True)


def test_a_pass_that_is_not_registered_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unknown(Planted):
        """Nobody knows it."""

        name: ClassVar[str] = "unknown"

    with pytest.raises(ContractError, match="there is no pass 'unknown'"):
        check_pass(Unknown(), at_stage(FLOAT))


def test_the_outer_programs_stay() -> None:
    """The suite works on copies: what it was given is as it was, stage included."""
    program = at_stage("folded")
    text = str(program)
    check_pass(get_pass("legalize-onnx"), program)
    assert (str(program), program.stage) == (text, "folded")
    with pytest.raises(PreconditionError):
        Planted()(dataclasses.replace(program))

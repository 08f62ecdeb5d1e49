"""`check_pass`: the contract of a pass."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qalora_compile.errors import PreconditionError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.ir.spec import validate
from qalora_compile.ir.stages import ANY_STAGE
from qalora_compile.passes.framework.base import Pass, validating
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.recipes.replay import replay
from qalora_compile.testing.contract import Contract, bits_of_all, difference
from qalora_compile.verify.inputs import sample_inputs
from qalora_compile.verify.numeric.run_float64 import run_nodes

EXACT = 1e-6
"""Effect of rounding scales and zero-points to float32, relative to the outputs."""


def check_pass(
    step: Pass,
    program: Program,
    *,
    exact: bool | None = None,
    max_rel: float = EXACT,
    idempotent: bool = False,
    captured: Program | None = None,
    inputs: Sequence[Call] | None = None,
) -> None:
    """Assert that a pass keeps the contract of passes, on one program.

    The clauses:
      * text: it is a frozen dataclass with a docstring, known by its name, and its text, with every
        option, parses back to an equal pass;
      * stages: it refuses every stage that it does not consume with `PreconditionError`, and the
        result has the stage that it declares;
      * validity: the program satisfies the specification of its stage before and after;
      * purity: neither text nor tensors of its input change;
      * determinism: a second run gives the same graph and the same bits;
      * honesty: where it reports no change, the graph and the tensors are unchanged;
      * history: the result has one more entry, from which an equal pass parses;
      * storage: a result that is saved and loaded is the same, and so is the result of the pass on
        a program that was saved and loaded;
      * function: if it is exact, the outputs in float64 are the same within `max_rel`;
      * idempotence: if it is claimed, a second pass over the result changes nothing;
      * replay: with `captured`, the history of the result, run again there, gives the result.

    Args:
        step: The pass.
        program: At a stage that it consumes.
        exact: Whether it preserves the function; None: unless it is `lossy`.
        max_rel: Largest difference of an output, relative to its largest value.
        idempotent: Whether it claims to change nothing the second time.
        captured: The float program that `program` was made from.
        inputs: Calls to run on instead of two random ones.

    Raises:
        ContractError: a clause does not hold; it is named.
    """
    __tracebackhide__ = True
    contract = Contract(f"the pass {step.name}")
    _check_text(contract, step)
    _check_stages(contract, step, program)
    after = _check_run(contract, step, program)
    _check_storage(contract, step, program, after)
    if not step.lossy if exact is None else exact:
        with contract.clause("function: the outputs in float64 are the same"):
            calls = sample_inputs(program, 2) if inputs is None else inputs
            found = max(_distance(program, after, call) for call in calls)
            assert found <= max_rel, f"they differ by {found:.3g} of the largest, not {max_rel:.3g}"
    if idempotent:
        with contract.clause("idempotence: a second pass over the result changes nothing"):
            again = step(after)
            assert not again.modified, f"it reports {again.changes[0]}"
            assert not (found_in := difference(after, again.program)), found_in
    if captured is not None:
        with contract.clause("replay: the history of the result gives the result again"):
            assert not (found_in := difference(after, replay(after, captured))), found_in


def _check_text(contract: Contract, step: Pass) -> None:
    with contract.clause("text: the pass is a frozen dataclass with a docstring"):
        assert dataclasses.is_dataclass(step), "it is not a dataclass"
        assert hash(step) == hash(dataclasses.replace(step)), "equal passes have another hash"
        assert (type(step).__doc__ or "").strip(), "it has no docstring"
        for name in step.option_names():
            try:
                setattr(step, name, getattr(step, name))
            except dataclasses.FrozenInstanceError:
                continue
            raise AssertionError("it is not frozen")
    with contract.clause("text: the pass is known by its name, and its text parses back"):
        (again,) = Pipeline.parse(str(step)).passes
        assert again == step, f"{step} became {again}"


def _check_stages(contract: Contract, step: Pass, program: Program) -> None:
    contract.need(
        "stages: the program given is at a stage that the pass consumes",
        program.stage in step.consumes,
        f"it is {program.stage}",
    )
    for stage in set(ANY_STAGE) - set(step.consumes):
        with contract.refuses(f"stages: a program at stage {stage} is refused", PreconditionError):
            step(dataclasses.replace(program, stage=stage))


def _check_run(contract: Contract, step: Pass, program: Program) -> Program:
    """Check all clauses but the function, and return the result."""
    with contract.clause("validity: the program satisfies its stage before"):
        validate(program)
    text, tensors = str(program), bits_of_all(program.tensors())
    with contract.clause("validity: the pass runs, and its result satisfies its stage"):
        with validating():
            result = step(program)
        after = result.program
        validate(after)
    wanted = step.produces or program.stage
    contract.need("stages: the result has the stage that the pass says", after.stage == wanted,
                  f"it is {after.stage}, not {wanted}")  # fmt: skip
    now = bits_of_all(program.tensors())
    changed = [name for name in tensors | now if tensors.get(name) != now.get(name)]
    contract.need("purity: the tensors of the input stay", not changed, ", ".join(changed[:3]))
    contract.need("purity: the graph of the input stays", str(program) == text, "it changed")
    with contract.clause("determinism: a second run gives the same"):
        assert not (found := difference(after, step(program).program)), found
    with contract.clause("honesty: a pass that reports no change changes nothing"):
        same = dataclasses.replace(after, stage=program.stage, history=program.history)
        assert result.modified or not (found := difference(program, same)), found
    with contract.clause("history: one more entry, from which an equal pass parses"):
        assert after.history[:-1] == program.history, f"it is {after.history}"
        assert Pipeline.parse(after.history[-1]).passes == (step,), after.history[-1]
    return after


def _check_storage(contract: Contract, step: Pass, program: Program, after: Program) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        with contract.clause("storage: a result that is saved and loaded is the same"):
            after.save(Path(scratch) / "after")
            assert not (found := difference(after, Program.load(Path(scratch) / "after"))), found
        with contract.clause("storage: the pass does the same to a program that was saved"):
            program.save(Path(scratch) / "before")
            again = step(Program.load(Path(scratch) / "before")).program
            assert not (found := difference(after, again)), found


def _distance(before: Program, after: Program, call: Call) -> float:
    """The largest difference of an output in float64, relative to its largest value."""
    first, second = (_outputs(program, call) for program in (before, after))
    assert len(first) == len(second), f"{len(first)} outputs became {len(second)}"
    return max((_relative(a, b) for a, b in zip(first, second, strict=True)), default=0.0)


def _outputs(program: Program, call: Call) -> list[Tensor]:
    args, kwargs = ((), call) if isinstance(call, dict) else (tuple(call), {})
    leaves = program.leaves(args, kwargs)
    output = next(node for node in program.graph.nodes if node.op == "output")
    names = [node.name for node in output.all_input_nodes]
    values = run_nodes(program, leaves, names, torch.float64)
    return [values[name] for name in names if name in values]


def _relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{list(a.shape)} became {list(b.shape)}"
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    largest = float(a.double().abs().max())
    return float((a.double() - b.double()).abs().max()) / (largest or 1.0)

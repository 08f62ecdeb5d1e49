"""`compare_nodes`: compares a candidate with its reference value by value, against float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call, split_call
from qalora_compile.untrusted.artifacts import ArtifactKind, find_artifact
from qalora_compile.verdict import Verdict
from qalora_compile.verify.inputs import sample_inputs
from qalora_compile.verify.numeric.adversarial_inputs import adversarial_inputs
from qalora_compile.verify.numeric.decoding_calls import decoding_calls, every_token
from qalora_compile.verify.numeric.error_bound import (
    BoundCheck,
    check_bound,
    unless_ill_conditioned,
    without_numbers,
)
from qalora_compile.verify.numeric.references import References, ReferenceValues, run_references
from qalora_compile.verify.numeric.report import ModeReport, NumericReport, ValueRow
from qalora_compile.verify.numeric.run_candidate import (
    Compute,
    run_model,
    run_openvino,
    run_program,
)
from qalora_compile.verify.numeric.run_float64 import working_dtype
from qalora_compile.verify.numeric.work import Work
from qalora_compile.verify.padding import Padding, padding_of
from qalora_compile.verify.proof.graphs.graph import FX, OPENVINO, Graph, Ref
from qalora_compile.verify.proof.graphs.graph import Tensor as StoredTensor
from qalora_compile.verify.proof.match_structure import Match, match_values
from qalora_compile.verify.proof.nonfinite import damages
from qalora_compile.verify.proof.open_graph import open_graph
from qalora_compile.verify.runners.onnx_session import LEVELS, OnnxSession, hides, uses_library
from qalora_compile.verify.runners.openvino_session import OpenvinoSession


def named_inputs(program: Program, count: int, *, seed: int = 0) -> dict[str, Call]:
    """`count` random calls, and the adversarial calls that a program has inputs for, by name.

    A language model with its cache also gets the steps in which devices run it, and one with up to
    2,048 tokens a call in which each of them occurs.
    """
    drawn = sample_inputs(program, count, seed=seed)
    calls: dict[str, Call] = {f"random {i}": call for i, call in enumerate(drawn)}
    calls |= adversarial_inputs(program, seed=seed)
    return calls | decoding_calls(program, seed=seed) | every_token(program, seed=seed)


def compare_nodes(
    reference: Program | str | Path,
    candidate: Program | str | Path,
    inputs: Mapping[str, Call] | None = None,
    *,
    levels: Sequence[str] = tuple(LEVELS),
    library: str | Path | None = None,
    seed: int = 0,
) -> NumericReport:
    """Compare two programs, or a program and an exported model, along the graph.

    The reference runs in float64, which defines its meaning, and at working precision, which shows
    the effect of rounding; the candidate runs as it is. Every value that both compute (inputs and
    outputs of sites, nodes between them, the outputs) is checked by its distance from float64
    relative to that of the reference itself (`verify.numeric.error_bound`), so no tolerance is
    chosen.

    An exported model runs at every optimization level of ONNX Runtime. Its outputs are those of the
    file as it is; inner values come from a second session in which they are outputs too. If the
    file has functions for operators of ONNX Runtime, it runs once more on these, on the first
    input.

    Outputs must have the names and shapes of the reference's; integers and booleans must be equal.

    After Ctrl-C, the report has the modes that are done, and the others as undecided.

    Args:
        reference: A program, or the path of a program folder.
        candidate: A program or path as above, or an export folder or `.onnx` file.
        inputs: Calls by name; None draws two random and all adversarial ones (`named_inputs`).
        levels: Optimization levels of ONNX Runtime: `disabled`, `basic`, `extended`, `all`.
        library: A library of custom operators: a file that uses some runs with it and without it.
        seed: Seed of the inputs.

    Raises:
        UserInputError: the reference is not a program, an input does not fit it, a path cannot be
            read, or there is no input.
    """
    program = _program(reference)
    calls = named_inputs(program, 2, seed=seed) if inputs is None else dict(inputs)
    if not calls:
        raise UserInputError("no input was given to compare on", hint="pass at least one")
    graphs = (open_graph(reference), open_graph(candidate))
    matches = match_values(*graphs)
    if {m.kind for m in matches} <= {"read", "site", "node"}:
        raise UserInputError(
            "the two have no output in common", where=f"{graphs[0].label}, {graphs[1].label}"
        )
    leaves = {name: program.leaves(*split_call(call)) for name, call in calls.items()}
    modes, notes = _execution_modes(candidate, graphs[1], matches, levels, library)
    work = Work(len(leaves), sum(1 if mode.once else len(leaves) for mode in modes))
    made = run_references(program, _names(matches, 0), leaves, _working(candidate), work)
    with made as references:
        fixed = (references, graphs, matches, program, leaves, work)
        found = [work.guard(mode.name, partial(_try, mode, *fixed)) for mode in modes]
    rest = tuple(_absent_outputs(*graphs, next(iter(calls))))
    found = [mode if mode.problem else replace(mode, rows=mode.rows + rest) for mode in found]
    found += _damaged_modes(graphs)
    notes += _not_checked(found, calls) + _not_tensors(found, matches)
    return NumericReport(graphs[0].label, graphs[1].label, tuple(calls), tuple(found), tuple(notes))


def _check_levels(levels: Sequence[str]) -> None:
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        raise UserInputError(
            f"{', '.join(unknown) or 'nothing'} is no optimization level",
            hint=", ".join(LEVELS),
        )


def _damaged_modes(graphs: Sequence[Graph]) -> list[ModeReport]:
    """A failed mode for each stored tensor with NaN or infinities, even if no input reads it."""
    return [ModeReport("stored tensors", (), (), text) for text in damages(graphs)]


def _not_checked(modes: Sequence[ModeReport], names: Iterable[str]) -> list[str]:
    """Notes on the inputs for which no output could be checked in any mode that ran."""
    ran = [mode for mode in modes if not mode.problem]
    checked = {name for mode in ran for name, _ in mode.inputs}
    lost = [name for name in names if ran and name not in checked]
    why = "the reference is not accurate there itself, or all of it is padding"
    return [f"no output is checked on {name}: {why}" for name in lost]


def _not_tensors(modes: Sequence[ModeReport], matches: Sequence[Match]) -> list[str]:
    """Notes on the outputs of which no mode that ran has a row."""
    ran = [mode for mode in modes if not mode.problem]
    rows = {row.name for mode in ran for row in mode.rows}
    lost = [m.name for m in matches if m.kind == "output" and ran and m.name not in rows]
    return [f"{name} is not compared: it is not a tensor" for name in lost]


def _absent_outputs(a: Graph, b: Graph, tried: str) -> list[ValueRow]:
    """A failed row for each output that only one graph has; None does not count as an output."""
    rows = []
    for one, other, flip in ((a, b, False), (b, a, True)):
        for name, value in one.outputs.items():
            if value is not None and other.outputs.get(name) is None:
                lines = (one.line(value), "(nothing)")
                shown = (lines[1], lines[0]) if flip else lines
                found = without_numbers(f"{other.label} has no such output")
                rows.append(
                    ValueRow(
                        f"output {name}", "output", "", shown, tried, found, 0, Verdict.DIFFERENT
                    )
                )
    return rows


def _program(thing: Program | str | Path) -> Program:
    if isinstance(thing, Program):
        return thing
    found = find_artifact(thing)
    if found is None or found.kind is not ArtifactKind.PROGRAM:
        raise UserInputError(
            "the reference is not a program: only a program runs in float64",
            where=str(thing),
            hint="give a Program, or a folder of Program.save, finetune or fold",
        )
    return Program.load(found.path)


def _working(candidate: Program | str | Path) -> torch.dtype:
    """The precision at which a candidate computes: float32 for exported models."""
    try:
        program = _program(candidate)
    except UserInputError:
        return torch.float32
    return working_dtype(program)


@dataclass(frozen=True)
class _Candidate:
    """One execution mode of the candidate; `open` is called just before it runs.

    `once`: run on the first input only, because a run is slow and any input shows a mistake.
    """

    name: str
    open: Callable[[], Compute]
    once: bool = False


def _execution_modes(
    candidate: Program | str | Path,
    graph: Graph,
    matches: Sequence[Match],
    levels: Sequence[str],
    library: str | Path | None,
) -> tuple[list[_Candidate], list[str]]:
    _check_levels(levels)
    names = _names(matches, 1)
    if graph.dialect == FX:
        program = _program(candidate)
        return [_Candidate("as a program", lambda: run_program(program, names))], []
    path = Path(graph.label)
    if graph.dialect == OPENVINO:
        name = "OpenVINO's CPU plugin, float32"
        return [_Candidate(name, lambda: run_openvino(OpenvinoSession(path), graph, names))], []
    libraries: list[Path | None] = [None]
    notes = []
    if uses_library(graph.extra):
        if library is None:
            notes.append("not tried with the operator library, which was not given")
        else:
            libraries.append(Path(library))
    elif library is not None:
        notes.append("not tried with the operator library: the file has no operator of it")
    modes = []
    for level in levels:
        for one in libraries:
            kernels = "kernels of ONNX Runtime" if one is None else "operator library"
            modes.append(
                _Candidate(
                    f"optimization {level}, {kernels}",
                    lambda level=level, one=one: run_model(  # type: ignore[misc]
                        OnnxSession(path, one, level), graph, names
                    ),
                )
            )
    if hides(graph.extra):
        modes.append(
            _Candidate(
                "functions of the file instead of kernels",
                lambda: run_model(
                    OnnxSession(path, None, "disabled", spelled_out=True), graph, names
                ),
                once=True,
            )
        )
    return modes, notes


def _names(matches: Sequence[Match], side: int) -> list[str]:
    """The values of one graph that are compared, without stored tensors."""
    operands = [match.values[side] for match in matches]
    return list(dict.fromkeys(ref.name for ref in operands if isinstance(ref, Ref)))


def _try(
    mode: _Candidate,
    references: References,
    graphs: tuple[Graph, Graph],
    matches: Sequence[Match],
    program: Program,
    leaves: Mapping[str, Sequence[Any]],
    work: Work,
) -> ModeReport:
    """Run one mode on every input and check every value."""
    checked: dict[int, list[tuple[str, BoundCheck]]] = defaultdict(list)
    try:
        compute = mode.open()
        for index, (name, flat) in enumerate(leaves.items()):
            if index and mode.once:
                break
            values = references.load(index)
            padding = padding_of(program.signature, flat)
            found = compute(program, flat)
            for place, match in enumerate(matches):
                one = _check_value(match, graphs, values, found, padding)
                if one is not None:
                    checked[place].append((name, one))
            work.run_done()
    except UserInputError as error:
        return ModeReport(mode.name, (), (), error.what)
    rows = tuple(_row(matches[place], found) for place, found in sorted(checked.items()))
    by_input: dict[str, float] = defaultdict(float)
    for place, pairs in checked.items():
        if matches[place].kind == "output":
            for name, one in pairs:
                if one.checked or one.verdict == Verdict.DIFFERENT:
                    by_input[name] = max(by_input[name], one.ratio)
    return ModeReport(mode.name, rows, tuple(by_input.items()))


def _check_value(
    match: Match,
    graphs: tuple[Graph, Graph],
    reference: ReferenceValues,
    found: Mapping[str, Tensor],
    padding: Padding | None,
) -> BoundCheck | None:
    """The check of one value on one input; None if there is no value to compare it with."""
    as_is = match.kind == "output"
    if not as_is and not all(isinstance(operand, Ref) for operand in match.values):
        return None  # a stored tensor that a site reads; the proof compares it
    first = match.values[0]
    exact = _value(graphs[0], first, reference.exact)
    value = _value(graphs[1], match.values[1], found)
    if exact is None or (value is None and not as_is):
        return None
    if value is None:
        return without_numbers("the candidate returns no tensor")
    padded = None if padding is None else _padded(padding, exact)
    check = partial(check_bound, exact, found=value, unit=reference.unit, padding=padded)
    if not isinstance(first, Ref):
        return check(own=torch.zeros(exact.shape, dtype=torch.float64), as_is=as_is)
    return unless_ill_conditioned(
        check(own=reference.own[first.name], as_is=as_is),
        lambda: check(own=reference.sensitivity[first.name], as_is=as_is),
        reference.unit,
    )


def _value(graph: Graph, operand: Any, computed: Mapping[str, Tensor]) -> Tensor | None:
    """A computed value, a stored tensor or a number; None for anything else."""
    if isinstance(operand, Ref):
        return computed.get(operand.name)
    if isinstance(operand, StoredTensor):
        return torch.from_numpy(graph.tensors[operand.name].values().copy())
    return torch.as_tensor(operand) if isinstance(operand, (bool, int, float)) else None


def _padded(padding: Padding, value: Tensor) -> Tensor:
    """The elements that are padding; all elements if that cannot be determined."""
    found = padding.of(value)
    return torch.ones((), dtype=torch.bool) if found is None else found


def _row(match: Match, found: Sequence[tuple[str, BoundCheck]]) -> ValueRow:
    """The worst check of a value over all inputs."""
    decided = [(n, one) for n, one in found if one.checked or one.verdict == Verdict.DIFFERENT]
    tried = decided or list(found)
    name, worst = max(tried, key=lambda item: item[1].ratio)
    verdict = Verdict.worst(one.verdict for _, one in tried)
    undefined = sum(one.undefined for _, one in found)
    return ValueRow(
        match.name, match.kind, match.path, match.lines, name, worst, undefined, verdict
    )

"""`compare_nodes`: a candidate held to its reference value by value, measured by float64."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call, split_call, widened
from qalora_compile.progress import track
from qalora_compile.untrusted.artifacts import ArtifactKind, find_artifact
from qalora_compile.verdict import Verdict
from qalora_compile.verify.inputs import sample_inputs
from qalora_compile.verify.numeric.adversarial_inputs import adversarial_inputs
from qalora_compile.verify.numeric.decoding_calls import decoding_calls, every_token
from qalora_compile.verify.numeric.error_bound import (
    UNITS,
    BoundCheck,
    check_bound,
    without_numbers,
)
from qalora_compile.verify.numeric.report import ModeReport, NumericReport, ValueRow
from qalora_compile.verify.numeric.run_float64 import run_nodes, run_reference, working_dtype
from qalora_compile.verify.padding import Padding, padding_of
from qalora_compile.verify.proof.graphs.graph import ONNX, Graph, Ref
from qalora_compile.verify.proof.graphs.graph import Tensor as StoredTensor
from qalora_compile.verify.proof.match_structure import Match, match_values
from qalora_compile.verify.proof.nonfinite import damages
from qalora_compile.verify.proof.open_graph import open_graph
from qalora_compile.verify.runners.onnx_session import LEVELS, OnnxSession, hides, uses_library

Compute = Callable[[Program, Sequence[Any]], dict[str, Tensor]]
"""Values of the candidate by name, for the flat inputs of the reference."""


def named_inputs(program: Program, count: int, *, seed: int = 0) -> dict[str, Call]:
    """`count` random calls, and the adversarial ones that a program has inputs for, by name.

    Of a language model with its cache also the steps in which devices run it; of one that knows up
    to 2,048 tokens, a call with each of them.
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

    The reference runs in float64, which is what it means, and at working precision, which shows
    what rounding does to it; the candidate runs as it is. Every value that both compute (what sites
    read and give, what stands between them, the outputs) is judged by how much farther it lies from
    float64 than the reference itself: see `verify.judge`. So there is no tolerance to choose.

    An exported model runs at every level of ONNX Runtime's optimization. Its outputs are those of
    the file as it is; inner values come from a second session that gives them too. Where the file
    has functions for operators of ONNX Runtime's, it runs once more on these, on the first input.

    Outputs have to be those of the reference, in its shapes; integers and booleans equal.

    Args:
        reference: A program, or the path of a program folder.
        candidate: Likewise, or an export folder or `.onnx` file.
        inputs: Calls by name; None takes two random and all adversarial ones (`named_inputs`).
        levels: Of ONNX Runtime's optimization, of `disabled`, `basic`, `extended` and `all`.
        library: Of custom operators: a file that has some runs with it and without it.
        seed: Of the inputs.

    Raises:
        UserInputError: the reference is no program, an input does not fit it, a path cannot be
            read, or there is no input.
    """
    program = _program(reference)
    calls = named_inputs(program, 2, seed=seed) if inputs is None else dict(inputs)
    if not calls:
        raise UserInputError("no input was given to compare on", hint="pass at least one")
    _check_levels(levels)
    sides = (open_graph(reference), open_graph(candidate))
    matches = match_values(*sides)
    if {m.kind for m in matches} <= {"read", "site", "node"}:
        raise UserInputError(
            "the two have no output in common", where=f"{sides[0].label}, {sides[1].label}"
        )
    leaves = {name: program.leaves(*split_call(call)) for name, call in calls.items()}
    modes, notes = _execution_modes(candidate, sides[1], matches, levels, library)
    with _references(program, matches, leaves, _working(candidate)) as references:
        found = [
            _try(way, references, sides, matches, program, leaves)
            for way in track(modes, "compare")
        ]
    rest = tuple(_absent_outputs(*sides, next(iter(calls))))
    found = [way if way.problem else replace(way, rows=way.rows + rest) for way in found]
    found += _damaged_modes(sides)
    notes += _not_checked(found, calls) + _not_tensors(found, matches)
    return NumericReport(sides[0].label, sides[1].label, tuple(calls), tuple(found), tuple(notes))


def _check_levels(levels: Sequence[str]) -> None:
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        raise UserInputError(
            f"{', '.join(unknown) or 'nothing'} is no optimization level", hint=", ".join(LEVELS)
        )


def _damaged_modes(sides: Sequence[Graph]) -> list[ModeReport]:
    """A way that fails for each stored tensor with NaN or infinities, which no input may read."""
    return [ModeReport("stored tensors", (), (), text) for text in damages(sides)]


def _not_checked(modes: Sequence[ModeReport], names: Iterable[str]) -> list[str]:
    """The inputs on which no output was judged, on any way that ran."""
    ran = [way for way in modes if not way.problem]
    checked = {name for way in ran for name, _ in way.inputs}
    lost = [name for name in names if ran and name not in checked]
    why = "the reference is not accurate there itself, or all of it is padding"
    return [f"no output is judged on {name}: {why}" for name in lost]


def _not_tensors(modes: Sequence[ModeReport], matches: Sequence[Match]) -> list[str]:
    """The outputs that no way that ran has a row of."""
    ran = [way for way in modes if not way.problem]
    rows = {row.name for way in ran for row in way.rows}
    lost = [m.name for m in matches if m.kind == "output" and ran and m.name not in rows]
    return [f"{name} is not compared: it is no tensor" for name in lost]


def _absent_outputs(a: Graph, b: Graph, tried: str) -> list[ValueRow]:
    """A row that fails for each output that one side alone gives; None is no output."""
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
            "the reference is no program: only a program runs in float64",
            where=str(thing),
            hint="give a Program, or a folder of Program.save, finetune or fold",
        )
    return Program.load(found.path)


def _working(candidate: Program | str | Path) -> torch.dtype:
    """The precision at which a candidate computes: exported models in float32."""
    try:
        program = _program(candidate)
    except UserInputError:
        return torch.float32
    return working_dtype(program)


@dataclass(frozen=True)
class _Candidate:
    """One way of running the candidate; `open` is called when its turn comes.

    `once`: on the first input alone, where a run is dear and what it may show is in every input.
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
    names = _names(matches, 1)
    if graph.dialect != ONNX:
        program = _program(candidate)
        return [_Candidate("as a program", lambda: _run_program(program, names))], []
    path = Path(graph.label)
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
                    lambda level=level, one=one: _run_model(  # type: ignore[misc]
                        OnnxSession(path, one, level), graph, names
                    ),
                )
            )
    if hides(graph.extra):
        modes.append(
            _Candidate(
                "functions of the file instead of kernels",
                lambda: _run_model(
                    OnnxSession(path, None, "disabled", spelled_out=True), graph, names
                ),
                once=True,
            )
        )
    return modes, notes


def _names(matches: Sequence[Match], side: int) -> list[str]:
    """The values of one side that are compared and are no stored tensors."""
    operands = [match.values[side] for match in matches]
    return list(dict.fromkeys(ref.name for ref in operands if isinstance(ref, Ref)))


def _run_program(program: Program, names: Sequence[str]) -> Compute:
    def compute(source: Program, leaves: Sequence[Any]) -> dict[str, Tensor]:
        return run_nodes(program, program.signature.widen(leaves), frozenset(names))

    return compute


def _run_model(session: OnnxSession, graph: Graph, names: Sequence[str]) -> Compute:
    """The outputs from the file as it is, all else from a session that gives it too."""
    outputs = {out.name for out in session.session.get_outputs()}
    inner = [name for name in names if name not in outputs and name not in graph.inputs]

    def compute(source: Program, leaves: Sequence[Any]) -> dict[str, Tensor]:
        feed = {
            leaf.name: value.detach()
            for leaf, value in zip(source.signature.inputs, leaves, strict=True)
            if isinstance(value, Tensor)
        }
        wide = {name: widened(value) for name, value in feed.items()}
        arrays = {name: value.numpy() for name, value in wide.items()}
        found = session.outputs(arrays) | {n: v for n, v in wide.items() if n in graph.inputs}
        return found | (session.values(inner, arrays) if inner else {})

    return compute


@dataclass(frozen=True)
class _Reference:
    """The reference on every input, in files: `load(index)` gives (T, max |Aᵢ − T|) by node."""

    folder: Path
    unit: float

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        both = [load_file(self.folder / f"{index}.{side}") for side in ("exact", "own")]
        return both[0], both[1]


@contextmanager
def _references(
    program: Program,
    matches: Sequence[Match],
    leaves: Mapping[str, Sequence[Any]],
    working: torch.dtype,
) -> Iterator[_Reference]:
    """Run the reference on every input, in float64 and at the candidate's precision."""
    names = frozenset(_names(matches, 0))
    with tempfile.TemporaryDirectory() as folder:
        for index, flat in enumerate(track(list(leaves.values()), "float64")):
            exact, own = run_reference(program, flat, names, working)
            for side, values in (("exact", exact), ("own", own)):
                kept = {n: v.contiguous().clone() for n, v in values.items()}
                save_file(kept, Path(folder) / f"{index}.{side}")
        yield _Reference(Path(folder), UNITS[working])


def _try(
    way: _Candidate,
    references: _Reference,
    sides: tuple[Graph, Graph],
    matches: Sequence[Match],
    program: Program,
    leaves: Mapping[str, Sequence[Any]],
) -> ModeReport:
    """Run one way on every input and judge every value."""
    checked: dict[int, list[tuple[str, BoundCheck]]] = defaultdict(list)
    try:
        compute = way.open()
        for index, (name, flat) in enumerate(leaves.items()):
            if index and way.once:
                break
            exact, own = references.load(index)
            padding = padding_of(program.signature, flat)
            found = compute(program, flat)
            for place, match in enumerate(matches):
                one = _check_value(match, sides, (exact, own), found, references.unit, padding)
                if one is not None:
                    checked[place].append((name, one))
    except UserInputError as error:
        return ModeReport(way.name, (), (), error.what)
    rows = tuple(_row(matches[place], found) for place, found in sorted(checked.items()))
    by_input: dict[str, float] = defaultdict(float)
    for place, pairs in checked.items():
        if matches[place].kind == "output":
            for name, one in pairs:
                if one.checked or one.verdict == Verdict.DIFFERENT:
                    by_input[name] = max(by_input[name], one.ratio)
    return ModeReport(way.name, rows, tuple(by_input.items()))


def _check_value(
    match: Match,
    sides: tuple[Graph, Graph],
    reference: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    found: Mapping[str, Tensor],
    unit: float,
    padding: Padding | None,
) -> BoundCheck | None:
    """The judgement of one value on one input; None where there is no value to hold it to."""
    as_is = match.kind == "output"
    if not as_is and not all(isinstance(operand, Ref) for operand in match.values):
        return None  # a stored tensor that a site reads: the proof compares it
    exact = _value(sides[0], match.values[0], reference[0])
    value = _value(sides[1], match.values[1], found)
    if exact is None or (value is None and not as_is):
        return None
    if value is None:
        return without_numbers("the candidate gives no tensor")
    first = match.values[0]
    computed = isinstance(first, Ref)
    own = reference[1][first.name] if computed else torch.zeros(exact.shape, dtype=torch.float64)
    padded = None if padding is None else _padded(padding, exact)
    return check_bound(exact, own, value, unit, padded, as_is=as_is)


def _value(graph: Graph, operand: Any, computed: Mapping[str, Tensor]) -> Tensor | None:
    """A computed value, a stored tensor or a number; None where it is none of these."""
    if isinstance(operand, Ref):
        return computed.get(operand.name)
    if isinstance(operand, StoredTensor):
        return torch.from_numpy(graph.tensors[operand.name].values().copy())
    return torch.as_tensor(operand) if isinstance(operand, (bool, int, float)) else None


def _padded(padding: Padding, value: Tensor) -> Tensor:
    """The elements of padding; all of a value of which that cannot be told."""
    found = padding.of(value)
    return torch.ones((), dtype=torch.bool) if found is None else found


def _row(match: Match, found: Sequence[tuple[str, BoundCheck]]) -> ValueRow:
    """The worst of a value over the inputs; what is undefined on all of them is ambiguous."""
    decided = [(n, one) for n, one in found if one.checked or one.verdict == Verdict.DIFFERENT]
    tried = decided or list(found)
    name, worst = max(tried, key=lambda item: item[1].ratio)
    verdict = Verdict.worst(one.verdict for _, one in tried)
    undefined = sum(one.undefined for _, one in found)
    return ValueRow(
        match.name, match.kind, match.path, match.lines, name, worst, undefined, verdict
    )

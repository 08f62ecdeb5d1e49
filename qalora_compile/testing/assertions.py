"""`assert_equivalent` and `assert_structurally_equal`: the checks of `verify` as assertions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.verify.compare import Report, Tolerance
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs
from qalora_compile.verify.numeric.compare_nodes import compare_nodes, named_inputs
from qalora_compile.verify.numeric.report import NumericReport
from qalora_compile.verify.proof.certificate import Certificate
from qalora_compile.verify.proof.match_structure import Structure, compare_structure
from qalora_compile.verify.proof.prove import prove_equivalence

Side = Program | str | Path
Outcome = Certificate | NumericReport | Report | Structure
PROOF, NUMERIC = "proof", "numeric"


class NotEqualError(AssertionError):
    """The two compared things differ; carries the result of the check.

    Attributes:
        summary: The difference and its place, in a few lines.
        outcome: The certificate, report or structure.
    """

    def __init__(self, summary: str, outcome: Outcome) -> None:
        super().__init__(summary)
        self.summary, self.outcome = summary, outcome


def assert_equivalent(
    reference: Side,
    candidate: Side,
    *,
    by: Sequence[str] = (PROOF, NUMERIC),
    inputs: Sequence[Call] | None = None,
    tolerance: Tolerance | None = None,
    levels: Sequence[str] = ("all",),
    library: str | Path | None = None,
    seed: int = 0,
    allow_sampled: bool = False,
) -> None:
    """Assert that two programs, or a program and its export, compute the same.

    Args:
        reference: A program, or the path of a program folder.
        candidate: Likewise, or an export folder or `.onnx` file.
        by: The checks: `proof` (`prove_equivalence`: every coefficient, for all inputs) and
            `numeric` (`compare_nodes`: every value of a run, measured against float64). Neither has
            a tolerance.
        inputs: Calls to run on instead of two random and all adversarial ones.
        tolerance: Only compare the outputs on the inputs, within this (`verify_equivalence`): for
            steps that round, such as `accuracy_level=4`.
        levels: Optimization levels of ONNX Runtime, for `numeric`.
        library: A further library of custom operators for exported models.
        seed: Seed of random inputs.
        allow_sampled: Accept a proof with parts that were only tried on samples.

    Raises:
        NotEqualError: they differ, or could not be shown to be equal (UNDECIDED, SAMPLED).
        UserInputError: they cannot be compared.
    """
    __tracebackhide__ = True
    program = reference if isinstance(reference, Program) else Program.load(reference)
    if tolerance is not None:
        calls = sample_inputs(program, 2, seed=seed) if inputs is None else inputs
        _assert_within(program, candidate, calls, tolerance, library)
        return
    unknown = set(by) - {PROOF, NUMERIC}
    if unknown or not by:
        raise UserInputError(f"by is {list(by)}", hint=f"use {PROOF!r}, {NUMERIC!r} or both")
    if PROOF in by:
        certificate = prove_equivalence(reference, candidate, seed=seed)
        if not certificate.passes(allow_sampled=allow_sampled):
            found = certificate.difference or ""
            raise NotEqualError(
                _heading(program, candidate, f"proof: {certificate.verdict}", found), certificate
            )
    if NUMERIC in by:
        named: Mapping[str, Call] = (
            named_inputs(program, 2, seed=seed)
            if inputs is None
            else {f"input {i}": call for i, call in enumerate(inputs)}
        )
        numeric = compare_nodes(program, candidate, named, levels=levels, library=library)
        if not numeric.passed:
            found = numeric.difference or ""
            raise NotEqualError(
                _heading(program, candidate, f"numeric: {numeric.verdict}", found), numeric
            )


def _assert_within(
    program: Program,
    candidate: Side,
    calls: Sequence[Call],
    tolerance: Tolerance,
    library: str | Path | None,
) -> None:
    __tracebackhide__ = True
    report = verify_equivalence(program, candidate, calls, tolerance, library=library)
    if not report.passed:
        place = f"first diverging site: {report.first_divergence}"
        raise NotEqualError(_heading(program, candidate, f"more than {tolerance}", place), report)


def assert_structurally_equal(reference: Side, candidate: Side) -> None:
    """Assert that two graphs are the same around their quantized layers.

    Names, the order of independent nodes and the nodes that compute a quantized layer are ignored;
    constants are compared bit for bit. For the values of the layers use `assert_equivalent`.

    Raises:
        NotEqualError: they are not; the first two nodes that differ are shown.
        UserInputError: one of them cannot be read.
    """
    __tracebackhide__ = True
    structure = compare_structure(reference, candidate)
    if not structure.same:
        found = structure.difference or ""
        raise NotEqualError(_heading(reference, candidate, "structure differs", found), structure)


def _heading(reference: Side, candidate: Side, verdict: str, found: str) -> str:
    names = [
        f"program ({thing.stage})" if isinstance(thing, Program) else str(thing)
        for thing in (reference, candidate)
    ]
    return (
        f"{verdict}\n  reference: {names[0]}\n  candidate: {names[1]}\n  first difference: {found}"
    )

"""`verify_equivalence`: run two programs on the same inputs and compare, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call, split_call
from qalora_compile.progress import track
from qalora_compile.verdict import Verdict
from qalora_compile.verify.compare import (
    Comparison,
    Report,
    Tolerance,
    compare,
    worst_of,
)
from qalora_compile.verify.numeric.rounding import RoundingReference
from qalora_compile.verify.padding import Padding, counted, padding_of
from qalora_compile.verify.proof.nonfinite import damages_of
from qalora_compile.verify.runners.encoder_decoder import EncoderDecoderRunner
from qalora_compile.verify.runners.open_runner import ExportedRunner, ProgramRunner, open_runner
from qalora_compile.verify.runners.run import Runner

AFTER_LAST_SITE = "after the last site"


def verify_equivalence(
    reference: Program | str | Path,
    candidate: Program | str | Path,
    inputs: Sequence[Call],
    tolerance: Tolerance,
    *,
    library: str | Path | None = None,
) -> Report:
    """Compare two programs, or a program and an exported model, in evaluation mode.

    Args:
        reference: A program, or the path of a program folder, export folder or `.onnx` file.
        candidate: A program or path as above.
        inputs: Calls, each a tuple of positional arguments or a dict of keyword arguments.
        tolerance: The difference of the outputs that is admitted.
        library: A library of custom operators that exported models run with, for example
            `qalora_compile.runtime.library_path()`; None runs them on ONNX Runtime's own kernels.

    Returns:
        A report: `.passed`, the difference of each output and site and, if the two are different,
            the first site in graph order that is out of tolerance (converted to the site's scale),
            or the first stored tensor with NaN or infinite values, which never passes.

    Raises:
        UserInputError: no input was given, an input does not fit the signature, or a path cannot
            be read.
    """
    if not inputs:
        raise UserInputError(
            "no input was given to compare on", hint="pass at least one, e.g. [(x,)]"
        )
    extra = None if library is None else Path(library)
    a, b = open_runner(reference, extra), open_runner(candidate, extra)
    for one, other in ((a, b), (b, a)):
        if isinstance(one, (ExportedRunner, EncoderDecoderRunner)):
            one.meet(other)
    exact = RoundingReference.of(a, b) if tolerance.rounding else None
    outputs, sites, by_input = _compare_runs(a, b, inputs, exact)
    output_rows, site_rows = (tuple(map(worst_of, rows.values())) for rows in (outputs, sites))
    damaged = damages_of(reference, candidate)
    passed = bool(output_rows) and all(map(tolerance.admits, output_rows))
    first = None if passed else _first_divergence(output_rows, site_rows, tolerance)
    return Report(
        reference=a.label,
        candidate=b.label,
        tolerance=tolerance,
        inputs=len(inputs),
        outputs=output_rows,
        sites=site_rows,
        first_divergence=damaged[0] if damaged else first,
        verdict=Verdict.of(passed and not damaged),
        by_input=tuple(by_input),
    )


_Rows = dict[str, list[Comparison]]


def _compare_runs(
    a: Runner, b: Runner, inputs: Sequence[Call], exact: RoundingReference | None
) -> tuple[_Rows, _Rows, list[Comparison]]:
    """Comparisons of every output and site by name, and of the worst output of each input."""
    outputs, sites, by_input = _Rows(), _Rows(), list[Comparison]()
    in_steps = any(isinstance(side, ExportedRunner) and side.in_steps for side in (a, b))
    for index, call in enumerate(track(list(inputs), "verify")):
        leaves = _leaves(a, b, call)
        run_a, run_b = (side.run(side.signature.widen(leaves)) for side in (a, b))
        names = _same_names(run_a.outputs, run_b.outputs, a, b)
        padding = padding_of(a.signature, leaves) if in_steps else None
        found = [_compared(n, run_a.outputs[n], run_b.outputs[n], padding) for n in names]
        if exact is not None:
            found = exact.checked(found, leaves, run_b.outputs)
        for one in found:
            outputs.setdefault(one.name, []).append(one)
        if found:
            by_input.append(replace(worst_of(found), name=f"input {index}"))
        for name, value in run_a.sites.items():
            if name in run_b.sites:
                one = _compared(name, value, run_b.sites[name], padding)
                sites.setdefault(name, []).append(one)
    return outputs, sites, by_input


def _compared(name: str, a: Tensor, b: Tensor, padding: Padding | None) -> Comparison:
    return compare(name, counted(a, padding), counted(b, padding))


def _first_divergence(
    outputs: Sequence[Comparison], sites: Sequence[Comparison], tolerance: Tolerance
) -> str:
    scale = max((c.scale for c in outputs if c.scale == c.scale), default=0.0)
    for site in sites:
        if not tolerance.admits(site, output_scale=scale):
            return site.name
    return AFTER_LAST_SITE


def _leaves(a: Runner, b: Runner, call: Call) -> list[Any]:
    """Flat inputs of one call, bound and checked against both signatures."""
    args, kwargs = split_call(call)
    programs = [r.program for r in (a, b) if isinstance(r, ProgramRunner)]
    if programs:
        leaves = programs[0].leaves(args, kwargs)
    else:
        names = [leaf.name for leaf in a.signature.inputs]
        values = dict(zip(names, args, strict=False)) | dict(kwargs)
        if set(values) != set(names):
            raise UserInputError(f"an input call must give {', '.join(names)}")
        leaves = [values[name] for name in names]
    for runner in (a, b):
        if len(runner.signature.inputs) != len(leaves):
            raise UserInputError(
                f"the two models take different inputs: {a.label} takes "
                f"{[i.name for i in a.signature.inputs]}, {b.label} takes "
                f"{[i.name for i in b.signature.inputs]}"
            )
        runner.signature.check(runner.signature.widen(leaves))
    return leaves


def _same_names(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], a: Runner, b: Runner
) -> list[str]:
    if list(first) != list(second):
        raise UserInputError(
            f"the two models have different outputs: {list(first)} and {list(second)}",
            where=f"{a.label}, {b.label}",
        )
    return list(first)

"""`fold_run`: fold a trained RUN folder into a FOLDED one, and check it against the former."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora_compile.api.run_folder import copy_parts, load_run, write_run_file
from qalora_compile.api.steps import fold_adapters
from qalora_compile.errors import VerificationError
from qalora_compile.files import atomic_folder, reserve
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import write_program
from qalora_compile.verify.compare import Report, Tolerance, worst_of
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs

TOLERANCE = Tolerance(max_rel=1e-4, rounding=True)
"""The tolerance for an output of the folded program: rounding only."""
_FAILED = ".failed"
_KEPT = (
    *("model", "quant", "embeddings", "adapter", "fit", "reading", "status", "step", "ends"),
    *("base", "data_figures"),
)
"""Entries of a run's record that its folded program keeps."""


@dataclass(frozen=True, kw_only=True)
class FoldSpec:
    """A RUN folder to fold.

    Attributes:
        folder: The RUN folder, written by `finetune` or `adapt`.
        out: The FOLDED folder to write.
        overwrite: Replace an existing FOLDED.
    """

    folder: Path
    out: Path
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """The result of `fold_run`.

    Attributes:
        program: The folded program.
        report: The comparison with the trained program.
        status, step: How far the run was trained.
    """

    program: Program
    report: Report
    status: str | None
    step: int | None


def fold_run(spec: FoldSpec) -> FoldResult:
    """Fold the trained adapters of a RUN folder, and check that nothing changed.

    Raises:
        VerificationError: the two differ; the result is kept in a folder next to `spec.out`.
        UserInputError: the folder is not a trained one, or the output exists.
        OutputError: the folder cannot be written.
        PreconditionError: the program has no adapters, or one of them cannot fold.
    """
    source, out = spec.folder, spec.out
    with reserve(out, overwrite=spec.overwrite, inputs=[source]):
        program, record = load_run(source)
        check_program(program)
        folded = fold_adapters(program)
        check_program(folded)
        report = verify_equivalence(program, folded, sample_inputs(folded, 2), TOLERANCE)
        place = out if report.passed else out.with_name(out.name + _FAILED)
        with atomic_folder(place, overwrite=spec.overwrite or not report.passed) as folder:
            write_program(folded, folder)
            copy_parts(source, folder)
            kept = {name: record[name] for name in _KEPT if name in record}
            write_run_file(folder, kept | {"verified": {"fold": report.summary()}})
    if not report.passed:
        raise _refused(report, place)
    return FoldResult(
        program=folded, report=report, status=record.get("status"), step=record.get("step")
    )


def _refused(report: Report, place: Path) -> VerificationError:
    """The error of a failed check, which names the folder that keeps the result."""
    worst = worst_of(report.outputs)
    return VerificationError(
        f"the folded program differs from the trained one by {worst.max_abs:.3g}, "
        f"{worst.rounding or 0:.3g} times its rounding error",
        report=report,
        where=f"first diverging site: {report.first_divergence}",
        hint="this is a bug in the fold, not in your training: please report it; the result is "
        f"kept in {place}",
    )

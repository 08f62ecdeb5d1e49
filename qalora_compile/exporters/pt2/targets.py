"""The target `torch`, and how a program is lowered to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora_compile.config import ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.pt2.write import capabilities, check_compiler, write_pt2
from qalora_compile.exporters.targets import LoweredTarget
from qalora_compile.ir.program import Program

_SUFFIX = ".pt2"


@dataclass(frozen=True, kw_only=True)
class Pt2Target(LoweredTarget):
    """A target that is one `.pt2` file, and on request a compiled one next to it."""

    def check_path(self, path: Path, spec: ExportSpec) -> None:
        """Refuse a file with another suffix, or a machine that cannot compile.

        Raises:
            UserInputError: the suffix is not `.pt2`.
            UnsupportedError: it is to be compiled, and there is no compiler.
        """
        if path.suffix != _SUFFIX:
            raise UserInputError(f"{path} does not end in {_SUFFIX}", where=str(path))
        if spec.aot:
            check_compiler()

    def export(
        self, program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
    ) -> ExportReport:
        """See `write_pt2`; an interrupted run starts again."""
        return write_pt2(program, path, spec)


def _to_torch(program: Program, spec: ExportSpec) -> str:
    wide = any(site.bits == 8 for site in program.plan)
    planes = "split-planes{real-zero-points=true}," if wide else ""
    return f"{planes}legalize-torch,share-group-sums"


TORCH = Pt2Target(library="torch", lowering=_to_torch, capabilities=capabilities)

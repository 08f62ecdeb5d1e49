"""The target `coreml`, and how a program is lowered to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qalora_compile.config import ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.coreml.write import capabilities, write_coreml
from qalora_compile.exporters.targets import LoweredTarget, refuse_file
from qalora_compile.files.marks import PACKAGE_SUFFIX
from qalora_compile.ir.coreml_package import coremltools
from qalora_compile.ir.program import Program


@dataclass(frozen=True, kw_only=True)
class CoremlTarget(LoweredTarget):
    """A target that is one `.mlpackage` folder."""

    writes_folder: ClassVar[bool] = True

    def check_path(self, path: Path, spec: ExportSpec) -> None:
        """Refuse a path with another suffix, a file, or a machine without coremltools.

        Raises:
            UserInputError: the suffix is not `.mlpackage`, or the path is a file.
            UnsupportedError: `coremltools` is not installed.
        """
        if path.suffix != PACKAGE_SUFFIX:
            raise UserInputError(f"{path} does not end in {PACKAGE_SUFFIX}", where=str(path))
        refuse_file(path, spec)
        coremltools()

    def export(
        self, program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
    ) -> ExportReport:
        """See `write_coreml`; an interrupted run starts again."""
        return write_coreml(program, path, spec)


def _to_coreml(program: Program, spec: ExportSpec) -> str:
    return "legalize-coreml,share-group-sums"


COREML = CoremlTarget(library="Core ML", lowering=_to_coreml, capabilities=capabilities)

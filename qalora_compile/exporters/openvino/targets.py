"""The target `openvino`, and how a program is lowered to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora_compile.config import ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.openvino.library import openvino
from qalora_compile.exporters.openvino.write import capabilities, write_openvino
from qalora_compile.exporters.targets import LoweredTarget
from qalora_compile.ir.program import Program

_SUFFIX = ".xml"


@dataclass(frozen=True, kw_only=True)
class OpenvinoTarget(LoweredTarget):
    """A target that is one `.xml` file, with its weights in a `.bin` file next to it."""

    def check_path(self, path: Path, spec: ExportSpec) -> None:
        """Refuse a file with another suffix, or a machine without OpenVINO.

        Raises:
            UserInputError: the suffix is not `.xml`.
            UnsupportedError: `openvino` is not installed.
        """
        if path.suffix != _SUFFIX:
            raise UserInputError(f"{path} does not end in {_SUFFIX}", where=str(path))
        openvino()

    def export(
        self, program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
    ) -> ExportReport:
        """See `write_openvino`; an interrupted run starts again."""
        return write_openvino(program, path, spec)


def _to_openvino(program: Program, spec: ExportSpec) -> str:
    return f"legalize-openvino{{parameter-dtype={spec.parameter_dtype}}},share-group-sums"


OPENVINO = OpenvinoTarget(library="OpenVINO", lowering=_to_openvino, capabilities=capabilities)

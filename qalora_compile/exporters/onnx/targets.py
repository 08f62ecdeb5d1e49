"""The ONNX targets, and how a program is lowered to each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora_compile.config import FLOAT, ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.onnx.write import capabilities, write_onnx
from qalora_compile.exporters.targets import LoweredTarget
from qalora_compile.ir.program import Program

_SUFFIX = ".onnx"
_INT8 = 4
"""The accuracy level at which MatMulNBits runs on int8 activations."""


@dataclass(frozen=True, kw_only=True)
class OnnxTarget(LoweredTarget):
    """A target that is one `.onnx` file; large weights are in a second file next to it."""

    def check_path(self, path: Path, spec: ExportSpec) -> None:
        """Refuse a file with another suffix."""
        if path.suffix != _SUFFIX:
            raise UserInputError(f"{path} does not end in {_SUFFIX}", where=str(path))

    def export(
        self, program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
    ) -> ExportReport:
        """See `write_onnx`."""
        return write_onnx(program, path, spec, resume=resume)


def _with_planes(program: Program, spec: ExportSpec, legalize: str, options: str = "") -> str:
    """The text of a pipeline: the legalize pass and the passes around it.

    8-bit weights with integer zero-points become two planes, but for kernels on int8 activations
    and where weights are expanded to float: MatMulNBits has no float32 kernel of 8 bits. `options`
    of `split-planes` may name more layers.
    """
    wide = any(site.bits == 8 and (options or site.frozen_integer_zero) for site in program.plan)
    wide = wide and spec.accuracy_level != _INT8 and spec.expansion != FLOAT
    planes = f"split-planes{options}," if wide else ""
    return f"{planes}{legalize},share-group-sums"


def _to_ort(program: Program, spec: ExportSpec) -> str:
    options = f"accuracy-level={spec.accuracy_level},parameter-dtype={spec.parameter_dtype}"
    return _with_planes(program, spec, f"legalize-ort{{{options}}}")


def _to_ort_stock(program: Program, spec: ExportSpec) -> str:
    options = f"accuracy-level={spec.accuracy_level},correction={spec.correction}"
    split = "{real-zero-points=true}" if spec.correction != "digits" else ""
    return _with_planes(program, spec, f"legalize-ort-stock{{{options}}}", split)


def _to_onnx(program: Program, spec: ExportSpec) -> str:
    return _with_planes(program, spec, "legalize-onnx")


ORT = OnnxTarget(library="ONNX Runtime", lowering=_to_ort, capabilities=capabilities)
ORT_STOCK = OnnxTarget(library="ONNX Runtime", lowering=_to_ort_stock, capabilities=capabilities)
ONNX = OnnxTarget(library="any ONNX runtime", lowering=_to_onnx, capabilities=capabilities)

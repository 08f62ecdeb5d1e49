"""The ONNX targets, and how a program is lowered to each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qalora_compile.config import FLOAT, ExportSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.onnx.write import SUFFIXES, capabilities, write_onnx
from qalora_compile.exporters.targets import LoweredTarget
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import EMBEDDING

_EVERY_LAYER = "{real-zero-points=true}"
"""The option of `split-planes` by which layers with real zero-points are split too."""
_INT8 = 4
"""The accuracy level at which MatMulNBits runs on int8 activations."""


@dataclass(frozen=True, kw_only=True)
class OnnxTarget(LoweredTarget):
    """A target that is one `.onnx` or `.ort` file; large weights may be in a second file."""

    def check_path(self, path: Path, spec: ExportSpec) -> None:
        """Refuse a file with another suffix."""
        suffix = SUFFIXES[spec.format]
        if path.suffix != suffix:
            raise UserInputError(f"{path} does not end in {suffix}", where=str(path))

    def export(
        self, program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
    ) -> ExportReport:
        """See `write_onnx`."""
        report = write_onnx(program, path, spec, resume=resume)
        return replace(report, notes=(*report.notes, *_chosen_for(program, spec)))


def _chosen_for(program: Program, spec: ExportSpec) -> list[str]:
    """A note on the forms that were chosen for the release that has to run the model."""
    release = spec.release
    if release is None:
        return []
    chosen = [f"opset {spec.onnx_opset}", f"fusion {spec.fusion}"]
    if not release.bias and spec.target == "ort-stock":
        chosen.append("biases are added after MatMulNBits")
    if any(step == f"split-planes{_EVERY_LAYER}" for step in program.history):
        chosen.append("layers of 8 bits are two planes of 4")
    return [f"for {spec.runtime}: {', '.join(chosen)}"]


def _with_planes(program: Program, spec: ExportSpec, legalize: str, options: str = "") -> str:
    """The text of a pipeline: the legalize pass and the passes around it.

    8-bit weights with integer zero-points become two planes, but for kernels on int8 activations
    and where weights are expanded to float: MatMulNBits has no float32 kernel of 8 bits. `options`
    of `split-planes` may name more layers, and where the runtime takes no 8 bits at all, every
    layer is split.
    """
    without, on_int8 = _lacks_eight_bits(program, spec), spec.accuracy_level == _INT8
    options = _EVERY_LAYER if without else options
    wide = any(site.bits == 8 and (options or site.frozen_integer_zero) for site in program.plan)
    wide = wide and (without or not on_int8) and spec.expansion != FLOAT
    planes = f"split-planes{options}," if wide else ""
    return f"{planes}{legalize},share-group-sums"


def _lacks_eight_bits(program: Program, spec: ExportSpec) -> bool:
    """Whether MatMulNBits of the runtime that `spec` names takes no codes of 8 bits.

    Raises:
        UnsupportedError: a layer has no form for that runtime.
    """
    release, level = spec.release, spec.accuracy_level
    if release is None or spec.target == "onnx":
        return False
    without = level not in release.eight_bits
    for site in program.plan:
        narrow = site.bits == 2 and level == _INT8 and not release.two_bits
        if narrow or (site.bits == 8 and site.experts and without):
            raise UnsupportedError(
                f"MatMulNBits of ONNX Runtime {release.version} takes no codes of {site.bits} bits "
                f"at accuracy level {level}",
                where=site.name,
                hint="quantize to 4 bits, or name a newer release"
                if site.experts
                else "export with accuracy level 0, which stores them in 4 bits",
            )
    return without


def _to_ort(program: Program, spec: ExportSpec) -> str:
    options = f"accuracy-level={spec.accuracy_level},parameter-dtype={spec.parameter_dtype}"
    return _with_planes(program, spec, f"legalize-ort{{{options}}}")


def _to_ort_stock(program: Program, spec: ExportSpec) -> str:
    options = f"accuracy-level={spec.accuracy_level},correction={spec.correction}"
    split = _EVERY_LAYER if spec.correction != "digits" else ""
    return _with_planes(program, spec, f"legalize-ort-stock{{{options}}}", split)


def _to_onnx(program: Program, spec: ExportSpec) -> str:
    release = spec.release
    for site in program.plan:
        on_codes = site.kind == EMBEDDING and site.bits is not None
        if on_codes and release is not None and not release.tables:
            raise UnsupportedError(
                f"ONNX Runtime {release.version} has no kernel that unpacks rows of an embedding "
                "for target onnx",
                where=site.name,
                hint="keep embeddings in float (export --embeddings float), or take target ort",
            )
    return _with_planes(program, spec, "legalize-onnx")


ORT = OnnxTarget(library="ONNX Runtime", lowering=_to_ort, capabilities=capabilities)
ORT_STOCK = OnnxTarget(library="ONNX Runtime", lowering=_to_ort_stock, capabilities=capabilities)
ONNX = OnnxTarget(library="any ONNX runtime", lowering=_to_onnx, capabilities=capabilities)

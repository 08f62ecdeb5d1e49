"""What an exporter writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from qalora_compile import registry
from qalora_compile.config.base import AUTO, Spec, one_of
from qalora_compile.config.onnx_releases import OnnxRelease, release_of
from qalora_compile.config.preset import EXPANSIONS, NBITS, preset_of
from qalora_compile.errors import UnsupportedError, UserInputError

ONNX_TARGETS = tuple(registry.ONNX_TARGETS)
GRAPH_TARGETS = tuple(registry.GRAPH_TARGETS)
"""The targets for which passes lower the program: ONNX, OpenVINO, torch and Core ML."""
CHECKPOINT_TARGETS = tuple(registry.CHECKPOINT_TARGETS)
"""Checkpoints of other libraries; the last two hold integer zero-points only."""
TARGETS = registry.TARGETS.builtin
"""The built-in targets; `extend.register_target` adds others."""
FLOAT_TYPES = ("q8_0", "f16", "bf16", "f32")
"""How a GGUF file holds a matrix of floats, smallest first."""
ACCURACY_LEVELS = (0, 2, 4)
STOCK_ACCURACY_LEVELS = (0, 4)
"""Those of MatMulNBits; level 2 is one of GroupQuantLinear alone."""
PARAMETER_DTYPES = ("float32", "float16")
CORRECTIONS = ("fp32", "digits")
FUSION_OPSETS = {"none": 18, "standard": 23, "ort": 22}
"""The forms in which parts of a transformer may be written, and the opset that each needs.

`ort` needs no operator of opset 22: ONNX Runtime releases before 1.21 do not take it, and they
compute MultiHeadAttention wrongly for masks that differ inside a batch."""
FUSIONS = tuple(FUSION_OPSETS)
FORMATS = ("onnx", "ort")
"""The formats of a file for ONNX Runtime: ONNX, and its own."""
_AUTO_TARGETS = ("ort", "openvino")
"""The targets with a choice of `parameter_dtype` that may be left to the export."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec(Spec):
    """What an exporter writes.

    Attributes:
        target: `"ort"`: GroupQuantLinear with real-valued zero-points, in layered functions, for
            ONNX Runtime with this package's library, without it, and for other runtimes.
            `"ort-stock"`: MatMulNBits with integer zero-points and one shared group-sum
            correction, for any ONNX Runtime. `"onnx"`: blocked DequantizeLinear and the same
            correction, standard operators only. `"openvino"`: OpenVINO IR with real-valued
            zero-points. `"torch"`: a `.pt2` file of `torch.export` with torch's own kernel for
            4-bit weights, which takes real zeros. `"coreml"`: an `.mlpackage` for Apple devices
            (iOS 18, macOS 15) with real-valued zero-points, in float32. The others are checkpoints
            of other libraries (docs/reference/checkpoints.md), which take none of the options of
            ONNX below.
        opset: ONNX opset version of the standard domain; None takes 20, or 21 for `"onnx"`.
        accuracy_level: 0 computes in float32; 4 quantizes activations to int8, which is faster and
            errs by about 5e-3 of the output. 2, for target `"ort"` only, quantizes them to two int8
            digits, about 15 bits, which errs by about 1e-4. A file of target `"onnx"` cannot
            express it: the runtime decides (see docs/design/lowering.md).
        parameter_dtype: Dtype of scale and zero-point in targets `"ort"` and `"openvino"` and in
            checkpoints, and of all weights in target `"float"`: `"float32"` is exact, `"float16"`
            rounds, and is smaller and faster. `"gguf"` and `"safetensors"` leave no choice.
            `"auto"`, for `"ort"` and `"openvino"`, is float16 if that moves no weight by more than
            `PARAMETER_LIMIT` of its step (`passes.analysis.parameter_rounding`), and float32
            otherwise.
        expansion: For target `"ort"`: what the file runs on without the operator library. `"nbits"`
            is MatMulNBits and a correction, on codes. `"float"` makes each weight in float when the
            file is loaded: faster where MatMulNBits is slow, as in WebAssembly, in more memory.
        correction: For target `"ort-stock"`: `"fp32"` is exact; `"digits"` makes it part of the
            kernel, as two or three digits of the codes' width, which is faster and rounds.
        fusion: How norms, rotary embeddings and attention of a transformer are written:
            `"standard"`: the operators of opset 23 for them; `"ort"`: ONNX Runtime's own operators,
            for its releases 1.21 and 1.22, which lack the former; `"none"`: as the model computes
            them. None takes `"none"` for models without a key-value cache. With one it takes
            `"standard"`, or, if the given opset is too low for it, `"ort"` or else `"none"`.
        float_type: For target `"gguf"`: the type of matrices that are not quantized, `"q8_0"`,
            `"f16"`, `"bf16"` or `"f32"`; None takes for each the smallest that keeps every value.
        external_data: For ONNX: write the weights to a second file, `<name>_data`, which a runtime
            maps instead of reading. False writes one file, up to 1.9 GB of weights.
        format: Of the file of an ONNX target: `"onnx"`, or `"ort"` for ONNX Runtime's own format,
            which its reduced builds read. A `.ort` file holds stock operators alone.
        runtime: For ONNX: the release that has to run the model, `"onnxruntime==1.18"` or
            `"onnxruntime>=1.20"`. It decides on opset, fusion and the form of a layer, where these
            are left open (`config.onnx_releases`). None: the newest release.
        stateful: For target `"openvino"`: a key-value cache is state of the model, as OpenVINO
            GenAI runs it, and not inputs and outputs. Without a cache it has no effect.
        aot: For target `"torch"`: also compile with AOTInductor to `<name>_aot.pt2`, which C++
            loads. It needs g++ and runs on machines like this one.
        allow_unfolded: Export a program whose adapters are not folded (they stay in the graph), or
            one that is not quantized at all.
        overwrite: Replace an existing file.
    """

    target: str = "ort"
    opset: int | None = None
    accuracy_level: int = 0
    parameter_dtype: str = "float32"
    expansion: str = NBITS
    correction: str = "fp32"
    fusion: str | None = None
    float_type: str | None = None
    external_data: bool = False
    format: str = "onnx"
    runtime: str | None = None
    stateful: bool = True
    aot: bool = False
    allow_unfolded: bool = False
    overwrite: bool = False

    OPSETS: ClassVar[tuple[int, ...]] = (18, 19, 20, 21, 22, 23)

    @classmethod
    def from_preset(cls, name: str | None, *, target: str = "ort", **given: Any) -> ExportSpec:
        """The options of a preset, with `given` in their place; None is the default of an export.

        Args:
            name: One of `PRESETS`, or None.
            target: As the attribute; named presets are for `"ort"` and `"ort-stock"`.
            given: Other attributes.

        Raises:
            UserInputError: there is no such preset, or options conflict with it or the target.
        """
        chosen = preset_of(name)
        values: dict[str, Any] = {}
        if target in ("ort", "ort-stock"):
            values["accuracy_level"] = chosen.accuracy_level
        elif name is not None:
            raise UserInputError(
                f"preset is {name!r} for target {target}", hint="presets are for ort and ort-stock"
            )
        if target == "ort":
            values["expansion"] = chosen.expansion
        if target in _AUTO_TARGETS:
            values["parameter_dtype"] = chosen.parameter_dtype
        return cls(target=target, **values | given)

    @property
    def onnx_opset(self) -> int:
        """The opset version that is written."""
        least = FUSION_OPSETS.get(self.fusion or "", 18)
        return self.opset or max(21 if self.target == "onnx" else 20, least)

    @property
    def release(self) -> OnnxRelease | None:
        """The release that `runtime` names; None if it is left open."""
        return None if self.runtime is None else release_of(self.runtime)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the target is a checkpoint of another library, which keeps the codes."""
        if self.target in TARGETS:
            return self.target in CHECKPOINT_TARGETS
        return bool(getattr(registry.TARGETS.load(self.target), "on_codes", False))

    @property
    def is_graph(self) -> bool:
        """Whether the target is a graph of an inference runtime that this package writes."""
        return self.target in GRAPH_TARGETS

    @property
    def is_onnx(self) -> bool:
        """Whether the target is an ONNX model."""
        return self.target in ONNX_TARGETS

    def __post_init__(self) -> None:
        if self.target not in registry.TARGETS:
            raise UnsupportedError(
                f"there is no export target {self.target!r}",
                hint=f"use one of {', '.join(registry.TARGETS.names())}",
            )
        if self.opset is not None:
            one_of("opset", self.opset, self.OPSETS)
        dtypes = PARAMETER_DTYPES + ((AUTO,) if self.target in _AUTO_TARGETS else ())
        one_of("parameter_dtype", self.parameter_dtype, dtypes)
        one_of("expansion", self.expansion, EXPANSIONS)
        one_of("correction", self.correction, CORRECTIONS)
        one_of("accuracy_level", self.accuracy_level, ACCURACY_LEVELS)
        one_of("format", self.format, FORMATS)
        for option, known in (("fusion", FUSIONS), ("float_type", FLOAT_TYPES)):
            if getattr(self, option) is not None:
                one_of(option, getattr(self, option), known)
        if self.accuracy_level not in STOCK_ACCURACY_LEVELS and self.target == "ort-stock":
            raise UserInputError(
                f"accuracy_level is {self.accuracy_level!r} for target ort-stock",
                hint="MatMulNBits has levels 0 and 4; target ort has level 2",
            )
        if self.target in TARGETS:
            self._check_target()
        else:
            self._check_extension()
        if self.is_onnx:
            self._check_onnx()

    def _check_target(self) -> None:
        """Refuse options that the target does not have."""
        no_parameters = ("ort-stock", "onnx", "torch", "coreml", "gguf", "safetensors")
        checkpoint = CHECKPOINT_TARGETS
        not_onnx = tuple(target for target in TARGETS if target not in ONNX_TARGETS)
        others = tuple(target for target in TARGETS if target != "ort-stock")
        no_function = tuple(target for target in TARGETS if target != "ort")
        no_floats = tuple(target for target in TARGETS if target != "gguf")
        no_state = tuple(target for target in TARGETS if target != "openvino")
        for option, default, targets in (
            ("parameter_dtype", "float32", no_parameters),
            ("expansion", NBITS, no_function),
            ("correction", "fp32", others),
            ("float_type", None, no_floats),
            ("opset", None, not_onnx),
            ("accuracy_level", 0, not_onnx),
            ("fusion", None, not_onnx),
            ("external_data", False, not_onnx),
            ("format", "onnx", not_onnx),
            ("runtime", None, not_onnx),
            ("stateful", True, no_state),
            ("aot", False, tuple(target for target in TARGETS if target != "torch")),
            ("allow_unfolded", False, checkpoint),
        ):
            if getattr(self, option) != default and self.target in targets:
                fitting = [target for target in TARGETS if target not in targets]
                raise UserInputError(
                    f"{option} is {getattr(self, option)!r} for target {self.target}",
                    hint=f"it is an option of target {', '.join(fitting)}",
                )

    def _check_extension(self) -> None:
        """Refuse options that the target of an extension does not take."""
        taken = getattr(registry.TARGETS.load(self.target), "options", ())
        for field in dataclasses.fields(self):
            if field.name in ("target", "overwrite", *taken):
                continue
            if getattr(self, field.name) != field.default:
                raise UserInputError(
                    f"{field.name} is {getattr(self, field.name)!r} for target {self.target}",
                    hint=f"it takes {', '.join(taken) or 'no options'}",
                )

    def _check_onnx(self) -> None:
        """Refuse combinations of ONNX options that are not possible."""
        if self.external_data and self.format == "ort":
            raise UserInputError(
                "external_data is True for format ort", hint="a .ort file holds its weights itself"
            )
        self._check_release()
        if self.onnx_opset < 21 and self.target == "onnx":
            raise UserInputError(
                f"opset is {self.opset}", hint="target onnx needs 21: DequantizeLinear in blocks"
            )
        if self.fusion is not None:
            least = FUSION_OPSETS[self.fusion]
            if self.onnx_opset < least:
                raise UserInputError(
                    f"opset is {self.opset} with fusion {self.fusion!r}",
                    hint=f"its operators are in opset {least}; fusion='none' needs none of them",
                )
            if self.fusion == "ort" and self.target == "onnx":
                raise UserInputError(
                    "fusion is 'ort' for target onnx",
                    hint="that target has standard operators only: fusion 'standard' or 'none'",
                )
        if self.accuracy_level != 0 and self.target == "onnx":
            raise UserInputError(
                f"accuracy_level is {self.accuracy_level!r} for target onnx",
                hint="a standard model cannot express it; the session decides: "
                "docs/design/lowering.md",
            )

    def _check_release(self) -> None:
        """Refuse what the release that has to run the model does not take."""
        release = self.release
        if release is None:
            return
        if self.onnx_opset > release.opset:
            raise UserInputError(
                f"the model would be of opset {self.onnx_opset} for ONNX Runtime {release.version}",
                hint=f"that release takes opset {release.opset}; leave out opset and fusion",
            )
        if self.target == "onnx" and not release.blocks:
            raise UserInputError(
                f"target is 'onnx' for ONNX Runtime {release.version}, whose DequantizeLinear has "
                "no blocks",
                hint="the nearest targets are ort-stock and ort; or name release 1.19 or newer",
            )

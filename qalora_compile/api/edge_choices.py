"""What an edge folder is written with: embeddings and parameters, their reasons and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qalora_compile.api.choose_embeddings import EmbeddingChoice, choose_embeddings
from qalora_compile.api.export import with_parameters
from qalora_compile.brief import megabytes
from qalora_compile.config import FLOAT, ExportSpec, preset_of
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.passes.analysis.parameter_rounding import (
    PARAMETER_LIMIT,
    ParameterRounding,
    parameter_rounding,
)
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.quantize_embeddings import QuantizeEmbeddings
from qalora_compile.untrusted import quoted

_EMBEDDINGS = {"bits": int, "group_size": int}
LOADING = 23
"""Bytes of memory for a weight that is made in float at load: docs/reference/clients.md."""
WASM_MEMORY = 4 << 30
"""Bytes that WebAssembly can have."""
_UNMEASURED = "not measured: scales are computed while the file is written"


@dataclass(frozen=True)
class EdgeChoices:
    """The choices for one model, as they are printed and recorded.

    Attributes:
        preset: The name of the preset, or None.
        embeddings: How embeddings and heads are written.
        rounding: What storing scales and zero-points moves, in the dtype that was chosen; None if
            it was not measured.
        parameters: Why that dtype.
        weights: The number of weights of the model.
    """

    preset: str | None
    embeddings: EmbeddingChoice
    rounding: ParameterRounding | None
    parameters: str
    weights: int

    def record(self, spec: ExportSpec, size: int) -> dict[str, Any]:
        """The entry `preset` of `qalora.json`.

        Args:
            spec: How the model was exported.
            size: Bytes of its files.
        """
        rounding = self.rounding
        expanded = {"expansion": FLOAT} if spec.expansion == FLOAT else {}
        return expanded | {
            "name": self.preset,
            "accuracy_level": spec.accuracy_level,
            "parameter_dtype": spec.parameter_dtype,
            "parameters": self.parameters,
            "embeddings": self.embeddings.reason,
            "bytes": size,
            "bits_per_weight": round(8 * size / self.weights, 3) if self.weights else None,
            "largest_movement": None if rounding is None else rounding.steps,
            "largest_movement_at": None if rounding is None else rounding.where,
            "embedding_loss": self.embeddings.loss,
        }

    def rows(self, spec: ExportSpec, size: int) -> dict[str, str]:
        """The same for people, as rows of a summary."""
        shown = {
            "preset": self._named(),
            "activations": f"accuracy level {spec.accuracy_level}",
            "embeddings": self.embeddings.reason,
        }
        if spec.expansion == FLOAT:
            shown["without the library"] = (
                f"weights in float, made at load, which takes {megabytes(LOADING * self.weights)}"
            )
        if spec.target in ("ort", "openvino"):
            shown["scale and zero-point"] = f"{spec.parameter_dtype}: {self.parameters}"
        if self.weights:
            shown["bits per weight"] = f"{8 * size / self.weights:.2f}"
        return shown

    def _named(self) -> str:
        """The preset with its purpose."""
        if self.preset is None:
            return "none: the default"
        purpose = preset_of(self.preset).purpose
        return f"{self.preset}: {purpose}" if purpose else self.preset


def chosen_for(
    program: Program,
    spec: ExportSpec,
    preset: str | None,
    embeddings: int | str,
    *,
    required: bool = False,
) -> tuple[Program, ExportSpec, EdgeChoices]:
    """The program with its embeddings as written, `spec` with its parameters decided, and why.

    Args:
        program: Quantized, adapted or folded; or in float, which is left as it is.
        spec: How it is exported.
        preset: The name of a preset, for the record.
        embeddings: One of `config.EMBEDDINGS`.
        required: It is an error if there is no embedding and no head to quantize.

    Raises:
        UserInputError: see `choose_embeddings`; or WebAssembly has too little memory for the model.
    """
    if preset == "web" and spec.expansion == FLOAT:
        _check_memory(_weights(program))
    if not program.plan.to_quantize():
        embeddings = FLOAT
    choice = choose_embeddings(program, embeddings, required=required)
    if choice.step is not None:
        program = Pipeline([choice.step])(program).program
    half = None
    if spec.parameter_dtype != "float32":
        half = parameter_rounding(program, torch.float16)
    decided = with_parameters(spec, half)
    if decided.parameter_dtype == "float16":
        rounding, why = half, _text(half)
    else:
        rounding = parameter_rounding(program, torch.float32)
        why = _text(rounding)
        if half is not None:
            why = f"in float16, {_text(half)}, more than {PARAMETER_LIMIT:.1e}"
    return program, decided, EdgeChoices(preset, choice, rounding, why, _weights(program))


def _check_memory(weights: int) -> None:
    """Refuse a model that WebAssembly cannot load in float."""
    if weights * LOADING > WASM_MEMORY:
        raise UserInputError(
            f"preset is 'web' for {weights / 1e6:.0f} million weights: to load them in float takes "
            f"{megabytes(weights * LOADING)}, and WebAssembly has {megabytes(WASM_MEMORY)}",
            hint="export --expansion nbits is for WebGPU, and loads in WebAssembly, where it is "
            "slow; or export --target onnx without a preset, with a session option: "
            "docs/reference/clients.md",
        )


def _text(rounding: ParameterRounding | None) -> str:
    """What storing scales and zero-points moves."""
    if rounding is None:
        return _UNMEASURED
    return f"no weight moves by more than {rounding.steps:.1e} of its step ({rounding.where})"


def _weights(program: Program) -> int:
    """The number of weights in the plan; those that share memory count once."""
    tensors, counted = program.tensors(), dict[int, int]()
    for site in program.plan:
        stored = tensors.get(site.weight)
        size = site.k * site.n * (site.experts or 1)
        counted.setdefault(site.storage, size if stored is None else stored.numel())
    return sum(counted.values())


def with_recorded_embeddings(program: Program, record: Mapping[str, Any]) -> Program:
    """The program with embeddings on the codes that the record of an edge folder names.

    It is what the folder was compared with, as `export` quantizes embeddings that the program has
    in float.

    Raises:
        UserInputError: the record is malformed.
    """
    stated = record.get("embeddings")
    if stated and (
        not isinstance(stated, dict) or {k: type(v) for k, v in stated.items()} != _EMBEDDINGS
    ):
        raise UserInputError(f"the embeddings in the record are malformed: {quoted(stated)}")
    frozen = any(site.frozen_integer_zero for site in program.plan)
    if not stated or frozen or not program.plan.to_quantize():
        return program
    step = QuantizeEmbeddings(bits=stated["bits"], group_size=stated["group_size"])
    return Pipeline([step])(program).program

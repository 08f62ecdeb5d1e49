"""What is compared: each runtime with each file it can run, one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import environments
from qalora_compile.runtime import kernel_level

INT8: dict[str, Any] = {"accuracy_level": 4}


@dataclass(frozen=True, kw_only=True)
class Edge:
    """How `quantize` writes an edge folder.

    Attributes:
        preset: As `--preset`; None is the default.
        export: Fields of `ExportSpec`.
        library: Copy the operator library into the folder, for GenAI.
    """

    preset: str | None = None
    export: Mapping[str, Any] = field(default_factory=dict)
    library: bool = False


EDGES = {
    "default": Edge(),
    "exact": Edge(preset="exact"),
    "fast": Edge(preset="fast"),
    "small": Edge(preset="small"),
    "fast-with-library": Edge(preset="fast", library=True),
    "stock": Edge(export={"target": "ort-stock"}),
    "stock-int8": Edge(export={"target": "ort-stock"} | INT8),
}
"""Artefacts that are edge folders; the others are named in `artefacts`."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table.

    Attributes:
        name: How it is shown.
        family: Rows of one family are one runtime; ratios refer to the best of `REFERENCE`.
        engine: Module of `engines`.
        artefact: What it runs, see `artefacts.artefact`.
        python: The Python that runs it, from the cache folder.
        options: Further options of the engine.
        loading: Memory that it takes, as a multiple of its file's bytes.
        remark: What the reader has to know.
    """

    name: str
    family: str
    engine: str
    artefact: str
    python: Callable[[Path], Path] = environments.own_python
    options: Mapping[str, Any] = field(default_factory=dict)
    loading: float = 3
    remark: str = ""


REFERENCE = "llama.cpp"
"""The family that ratios refer to."""
FLOAT = "float32 ONNX"
"""The variant whose perplexity and greedy tokens the others are compared with."""
_LIBRARY = {"library": True}


def _ours(name: str, artefact: str, *, library: bool) -> Variant:
    kernels = "library" if library else "no library"
    return Variant(
        name=f"{name}, {kernels}",
        family="ours",
        engine="ort",
        artefact=artefact,
        options=_LIBRARY if library else {},
        loading=3 if library else 8,  # without it, codes are laid out again for stock kernels
    )


def _llama(form: str, artefact: str, remark: str = "") -> Variant:
    return Variant(
        name=f"llama.cpp {form}",
        family=REFERENCE,
        engine="llama",
        artefact=artefact,
        remark=remark,
    )


VARIANTS = (
    _ours("default", "default", library=True),
    _ours("default", "default", library=False),
    _ours("exact", "exact", library=True),
    _ours("small", "small", library=True),
    _ours("fast", "fast", library=True),
    _ours("fast", "fast", library=False),
    Variant(name="ORT stock", family="ONNX Runtime", engine="ort", artefact="stock"),
    Variant(name="ORT stock, int8", family="ONNX Runtime", engine="ort", artefact="stock-int8"),
    Variant(
        name="GenAI, fast, library",
        family="GenAI",
        engine="genai",
        artefact="fast-with-library",
        python=environments.genai_python,
    ),
    Variant(
        name="GenAI, stock, int8",
        family="GenAI",
        engine="genai",
        artefact="stock-int8",
        python=environments.genai_python,
    ),
    _llama("Q4_0", "q4_0", "requantized from Q4_1 by llama.cpp"),
    _llama("Q4_1", "q4_1"),
    _llama(
        "Q4_K_M",
        "q4_k_m",
        "requantized from Q4_1 by llama.cpp, which takes other types for rows that are no "
        "multiple of 256",
    ),
    Variant(
        name="OpenVINO Q4_0",
        family="OpenVINO",
        engine="openvino",
        artefact="openvino",
        python=environments.openvino_python,
        remark="made from the Q4_0 file by OpenVINO GenAI, which rounds the minima of Q4_1; "
        "key-value cache in 8 bits, its default",
    ),
    Variant(name=FLOAT, family="float", engine="ort", artefact="float"),
)


def usable(variant: Variant) -> str:
    """Why a variant cannot run here, or nothing."""
    wants = variant.options.get("library") or variant.artefact == "fast-with-library"
    return "the operator library was not built" if wants and kernel_level() is None else ""

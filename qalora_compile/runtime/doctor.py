"""What this machine and installation have: versions, CPU features, kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from qalora_compile._version import __version__
from qalora_compile.errors import UnsupportedError
from qalora_compile.optional import require
from qalora_compile.runtime.library import (
    kernel_levels,
    kernel_note,
    library_path,
    library_version,
    register,
)

_PACKAGES = {
    "torch": "core",
    "safetensors": "core",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnx-ir": "onnx",
    "onnxruntime": "onnx",
    "transformers": "hf",
    "gguf": "hf",
}
_FEATURES = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def describe_machine() -> dict[str, Any]:
    """Versions, CPU features, and which kernels a quantized layer will run, by name."""
    facts: dict[str, Any] = {
        "qalora-compile": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cpu features": ", ".join(cpu_features()) or "none of those that matter here",
    }
    for package, extra in _PACKAGES.items():
        facts[package] = _version(package, extra)
    facts["kernels, target ort-stock"] = _stock_kernels()
    facts["operator library"] = _library()
    facts["kernels, target ort"] = _library_kernels()
    return facts


def cpu_features() -> list[str]:
    """Instruction sets of interest that the operating system reports."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    words = set(text.split())
    return [feature for feature in _FEATURES if feature in words]


def cpu_name() -> str:
    """The processor's name, as the operating system reports it, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _version(package: str, extra: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"missing: pip install 'qalora-compile[{extra}]'"


def _library() -> str:
    """Where the operator library is, and of which version."""
    try:
        path = library_path()
    except UnsupportedError as error:
        return f"none: {error.hint}"
    found = library_version()
    stale = "" if found == __version__ else f", built from {found}: install the package again"
    return f"{path}{stale}"


def _library_kernels() -> str:
    """Register the library with a session's options, as a user would, and name its kernels."""
    levels = kernel_levels()
    if not levels:
        return "stock: MatMulNBits and a correction"
    note = kernel_note()
    has = f"has {', '.join(levels)}" + (f"; {note}" if note else "")
    forced = os.environ.get("QALORA_KERNEL")
    if forced:
        return f"{forced}, by the environment variable QALORA_KERNEL ({has})"
    try:
        runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        register(runtime.SessionOptions())
    except UnsupportedError as error:
        return f"stock: {error}"
    return f"GroupQuantLinear, {levels[-1]} ({has})"


def _stock_kernels() -> str:
    """Run one tiny MatMulNBits to see that the installed ONNX Runtime has its kernel."""
    try:
        import numpy as np
        import onnx
        import onnxruntime
    except ImportError:
        return "unknown: onnx or onnxruntime is missing"
    make = onnx.helper
    k, n, block = 32, 16, 32
    constants = {
        "q": np.full((n, 1, block // 2), 0x99, np.uint8),
        "s": np.ones((n, 1), np.float32),
        "z": np.full((n, 1), 8, np.uint8),
    }
    node = make.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=block,
    )
    value = make.make_tensor_value_info
    float32 = onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [node],
        "doctor",
        [value("x", float32, [1, k])],
        [value("y", float32, [1, n])],
        [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    opsets = [make.make_opsetid("", 20), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        result = session.run(None, {"x": np.ones((1, k), np.float32)})[0]
    except Exception as error:  # whatever ONNX Runtime says is the finding
        return f"MatMulNBits fails: {str(error).splitlines()[0]}"
    right = bool(np.allclose(result, k))
    return (
        "MatMulNBits, 4 bits: works" if right else f"MatMulNBits computes {result[0, 0]}, not {k}"
    )

"""ONNX Runtime sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.onnx_file import check_onnx
from qalora_compile.optional import require
from qalora_compile.runtime.library import kernel_level, register

QDQ_ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"


def open_session(
    path: str | Path,
    *,
    threads: int | None = None,
    library: bool | None = None,
    exact: bool = False,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        path: A `.onnx` file.
        threads: Threads inside an operator; None leaves the choice to ONNX Runtime.
        library: Run `GroupQuantLinear` with this package's operator library; None takes it where it
            was built. Models without that operator are the same either way.
        exact: Compute models of target `onnx` in float32, not on int8 activations.

    Raises:
        UserInputError: the file is missing, truncated or not one that ONNX Runtime loads, or it is
            refused before: see `onnx_file.check_onnx`.
        UnsupportedError: the library is asked for, and was not built.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
    if not Path(path).is_file():
        raise UserInputError(f"there is no file {path}", where=str(path))
    check_onnx(Path(path))
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry(QDQ_ACCURACY_KEY, "0")
    if library or (library is None and kernel_level() is not None):
        register(options)
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises bare exception types of its own
        raise UserInputError(
            f"ONNX Runtime cannot load {Path(path).name}: {str(error).splitlines()[0]}",
            where=str(path),
            hint="export it again; a truncated file cannot be repaired",
        ) from error

"""ONNX Runtime sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.library import kernel_level, register
from qalora_compile.untrusted import quoted
from qalora_compile.untrusted.artifacts import SHARED_CACHE_KEY, model_file
from qalora_compile.untrusted.ort_file import check_model

_WITH_LIBRARY: WeakSet[Any] = WeakSet()
"""The sessions that were opened with the operator library."""
QDQ_ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"


def open_session(
    path: str | Path,
    *,
    threads: int | None = None,
    library: bool | None = None,
    exact: bool = False,
    trusted: bool = False,
    initializers: Mapping[str, Any] | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        path: An `.onnx` file, a file in ONNX Runtime's own format (`.ort`), or an edge folder with
            one graph.
        threads: Threads inside an operator; None leaves the choice to ONNX Runtime.
        library: Run `GroupQuantLinear` with this package's operator library; None: if it was
            built. This has no effect on models without that operator.
        exact: Compute models of target `onnx` in float32, not on int8 activations.
        trusted: Load the file without checking it first, because you trust its source.
        initializers: Name → `OrtValue` in the place of a tensor of the second file.

    Raises:
        UserInputError: the file is missing or truncated, ONNX Runtime cannot load it, or
            `ort_file.check_model` refuses it.
        UnsupportedError: the library is asked for and was not built.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
    path = model_file(Path(path)) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserInputError(f"there is no file {path}", where=str(path))
    if not trusted:
        check_model(path)
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry(QDQ_ACCURACY_KEY, "0")
    registers = library or (library is None and kernel_level() is not None)
    if registers:
        register(options)
    if initializers:
        options.add_external_initializers(list(initializers), list(initializers.values()))
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise UserInputError(
            f"ONNX Runtime cannot load {path.name}: {str(error).splitlines()[0]}",
            where=str(path),
            hint="export it again; a truncated file cannot be repaired",
        ) from error
    if registers:
        _WITH_LIBRARY.add(session)
    return session


def shares_cache(session: Any) -> bool:
    """Whether a session takes one buffer as the past and the present of a key-value cache.

    The model has to say so, and the session has to be from `open_session` with the library.
    """
    stated = session.get_modelmeta().custom_metadata_map
    return session in _WITH_LIBRARY and SHARED_CACHE_KEY in stated


def run_values(session: Any, names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    """Run a session on values and return its outputs, all as `onnxruntime.OrtValue`.

    Raises:
        UserInputError: ONNX Runtime cannot run the model on them.
    """
    try:
        found: list[Any] = session.run_with_ort_values(list(names), dict(values))
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise UserInputError(
            f"ONNX Runtime cannot run the model: {quoted(str(error), 300)}",
            hint="export it again; if that does not help, it is a bug of the exporter",
        ) from error
    return found

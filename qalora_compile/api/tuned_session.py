"""`open_tuned`: a session of a tuned model on the base's own files, which other sessions share."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.api.diff import DATA_FILE, PATCH_FILE, Part, check_origin, read_patch
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.session import open_session
from qalora_compile.untrusted import check_folder
from qalora_compile.untrusted.artifacts import model_file
from qalora_compile.untrusted.element_types import PROGRAM_TYPES
from qalora_compile.untrusted.onnx_file import check_onnx

_STORED = ("float32", "float16", "uint8", "int64")
_TYPES = {t.onnx: np.dtype(t.name) for t in PROGRAM_TYPES if t.name in _STORED}
"""Element types that an exported model stores, by their numbers in ONNX."""


def open_tuned(
    base: str | Path, patch: str | Path, *, threads: int | None = None, library: bool | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` of a tuned model, without writing its folder.

    The base is mapped, so sessions of many patches hold its weights once, and each its own tensors.

    Args:
        base: The edge folder that `diff` had as BASE, exported with its weights in a second file
            (`--external-data`).
        patch: The folder that `diff` wrote.
        threads: See `runtime.open_session`.
        library: See `runtime.open_session`.

    Raises:
        UserInputError: the patch is damaged, or the base is another one.
        UnsupportedError: the patch changes more than tensors of the second file.
    """
    base, patch = Path(base), Path(patch)
    check_folder(patch)
    record, files = read_patch(patch / PATCH_FILE)
    check_origin(base, patch, record)
    model = model_file(base)
    name = model.relative_to(base).as_posix()
    unchanged = (Part(name, 0, model.stat().st_size),)
    if name not in files or files[name].parts != unchanged:
        raise UnsupportedError(
            f"the patch changes {name} itself, not only its weights",
            where=str(patch),
            hint="export both folders with --external-data, or write the tuned one with apply",
        )
    return open_session(
        model, threads=threads, library=library, initializers=_values(model, patch, record)
    )


def _values(model: Path, patch: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Name → `onnxruntime.OrtValue` of the tensors that the patch changes."""
    runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
    rows, found = check_onnx(model).tensors, {}
    with (patch / DATA_FILE).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if record["tensors"] else b""
    for key, (offset, length) in record["tensors"].items():
        row = rows.get(str(key).partition(":")[2])
        if row is None or row.kind not in _TYPES:
            raise UserInputError(f"the model has no tensor {key}", where=str(patch / PATCH_FILE))
        count = length // _TYPES[row.kind].itemsize
        if count != row.size or not 0 <= offset <= len(data) - length:
            raise UserInputError(f"{key} has another size", where=str(patch / PATCH_FILE))
        values = np.frombuffer(data, _TYPES[row.kind], count, offset).reshape(row.shape)
        found[row.name] = runtime.OrtValue.ortvalue_from_numpy(values)
    return found

"""An exported OpenVINO model as it is read again, and its metadata. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from qalora_compile.ir.onnx_metadata import OnnxMetadata, metadata_of
from qalora_compile.optional import require
from qalora_compile.untrusted import check_regular

_MAX_BYTES = 1 << 30
_HEAD_BYTES = 4096
_HEAD = re.compile(rb"\s*(?:<\?xml[^>]*\?>\s*)?<net[ >]")


def read_openvino(path: Path) -> Any:
    """The model in an `.xml` file, with its weights from the `.bin` file next to it.

    Raises:
        UserInputError: a file is missing, or is not a regular file, or OpenVINO refuses it.
        UnsupportedError: `openvino` is not installed.
    """
    library = require("openvino", extra="openvino", purpose="read an OpenVINO model")
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        check_regular(file)
    with path.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if not _HEAD.match(head) or path.stat().st_size > _MAX_BYTES:
        raise UserInputError(f"{path.name} is not an OpenVINO model", where=str(path))
    try:
        return library.Core().read_model(str(path), str(weights))
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserInputError(
            f"OpenVINO cannot read {path.name}: {lines[-1]}",
            where=str(path),
            hint="export the model again: the file or its .bin file is damaged",
        ) from error


def openvino_metadata(model: Any, path: Path) -> OnnxMetadata:
    """The metadata of a model that this package exported.

    Raises:
        UserInputError: it was not exported by this package, or its metadata are malformed.
    """
    if not model.has_rt_info([ONNX_METADATA_KEY]):
        raise UserInputError(f"{path.name} was not exported by this package", where=str(path))
    return metadata_of(model.get_rt_info([ONNX_METADATA_KEY]).astype(str), path)

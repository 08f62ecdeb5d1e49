"""A written `.mlpackage` as it is read again: operators, weights and metadata."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from qalora_compile.ir.onnx_metadata import OnnxMetadata, metadata_of
from qalora_compile.optional import quiet_logger, require
from qalora_compile.untrusted import check_regular

MODEL_PART, WEIGHTS_PART = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
"""Places of the specification and of the weights below `Data`."""
CONSTANT = "constexpr_blockwise_shift_scale"
"""The operator whose result is a dequantized weight."""
_NAME = "coremltools"
_MAX_BYTES = 1 << 31


def coremltools(module: str = "") -> Any:
    """The optional package `coremltools`, or a module of it, imported on first use.

    Args:
        module: Name below the package, for example `"proto"`.

    Raises:
        UnsupportedError: it is not installed; the message has the pip command.
    """
    name = f"{_NAME}.{module}" if module else _NAME
    with quiet():
        return require(name, extra="coreml", purpose="write or read a Core ML package")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and progress bars of coremltools and torch off the terminal.

    On Linux it warns of each library of macOS that it does not find.
    """
    with warnings.catch_warnings(), quiet_logger(_NAME), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def main_block(spec: Any) -> Any:
    """The block of the main function of a specification."""
    main = spec.mlProgram.functions["main"]
    return main.block_specializations[main.opset]


def read_specification(package: Path) -> Any:
    """The specification in a package; its weights are not read.

    Raises:
        UserInputError: a file is missing, is not a regular file, or is damaged.
        UnsupportedError: `coremltools` is not installed.
    """
    library, file = coremltools("proto"), package / "Data" / MODEL_PART
    check_regular(file)
    if file.stat().st_size > _MAX_BYTES:
        raise UserInputError(f"{package.name} is not a Core ML package", where=str(file))
    spec = library.Model_pb2.Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except Exception as error:  # the type is protobuf's, which need not be installed
        raise UserInputError(
            f"{file.name} is not a specification of Core ML",
            where=str(file),
            hint="export the model again: the file is damaged",
        ) from error
    return spec


def read_function(package: Path) -> Any:
    """The main function of a package with the values of its constants, as coremltools reads it.

    Raises:
        UserInputError: see `read_specification`; or the weights do not fit.
        UnsupportedError: `coremltools` is not installed.
    """
    spec, weights = read_specification(package), package / "Data" / WEIGHTS_PART
    load = coremltools("converters.mil.frontend.milproto.load").load
    with quiet():
        try:
            return load(spec, spec.specificationVersion, str(weights)).functions["main"]
        except Exception as error:  # of its reader of weights, or of any operator: many types
            raise UserInputError(
                f"coremltools cannot read {package.name}: {type(error).__name__}",
                where=str(package),
                hint="export the model again: a file is damaged",
            ) from error


def coreml_metadata(spec: Any, package: Path) -> OnnxMetadata:
    """The metadata of a package that this package exported.

    Raises:
        UserInputError: it was not exported by this package, or its metadata are malformed.
    """
    entries = spec.description.metadata.userDefined
    if ONNX_METADATA_KEY not in entries:
        raise UserInputError(f"{package.name} was not exported by this package", where=str(package))
    return metadata_of(entries[ONNX_METADATA_KEY], package)

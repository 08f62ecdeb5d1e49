"""Core ML packages in tests: read again, and computed by the values that coremltools infers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qalora_compile.ir.coreml_package import CONSTANT, read_function
from qalora_compile.verify.runners.coreml_session import CoremlSession

coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")


def builtin_to_string(dtype: Any) -> str:
    """The name of an element type."""
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(dtype))


def kinds(package: Path) -> list[str]:
    """The types of the operators, without constants."""
    return [op.op_type for op in read_function(package).operations if op.op_type != "const"]


def constants(package: Path) -> dict[str, Any]:
    """Name → operator of each quantized weight."""
    found = read_function(package).operations
    return {op.outputs[0].name: op for op in found if op.op_type == CONSTANT}


def run(package: Path, *inputs: Tensor) -> list[Tensor]:
    """The outputs for some inputs."""
    session = CoremlSession(package)
    names = [leaf.name for leaf in session.signature.inputs if leaf.dtype is not None]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return list(session.outputs(feed).values())

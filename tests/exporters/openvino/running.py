"""OpenVINO models in tests: compiled exactly, and read as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

openvino = pytest.importorskip("openvino", reason="openvino is not installed")

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def read(path: Path) -> Any:
    """The model in a file."""
    return openvino.Core().read_model(str(path))


def compiled(path: Path) -> Any:
    """The model on the CPU, in float32."""
    return openvino.Core().compile_model(read(path), "CPU", EXACT)


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """The outputs for some inputs, in the model's order."""
    found = compiled(path)([x.numpy() for x in inputs])
    return [torch.from_numpy(np.array(value)) for value in found.values()]


def constants(path: Path) -> dict[str, Any]:
    """Name → constant."""
    nodes = read(path).get_ops()
    return {n.get_friendly_name(): n for n in nodes if n.get_type_name() == "Constant"}


def codes_of(constant: Any) -> Any:
    """The codes of a constant of u2, u4 or u8, by bit arithmetic of our own."""
    bits = constant.get_element_type().bitwidth
    raw = np.frombuffer(constant.data.tobytes(), np.uint8)
    parts = [raw >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(list(constant.get_output_shape(0)))

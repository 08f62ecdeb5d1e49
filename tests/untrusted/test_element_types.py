"""The table of element types, against the libraries that it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qalora_compile.untrusted.element_types import ELEMENT_TYPES, PROGRAM_TYPES, ElementType

IN_TORCH = [kind for kind in ELEMENT_TYPES if hasattr(torch, kind.name) and kind.bits >= 8]


@pytest.mark.parametrize("kind", IN_TORCH, ids=lambda kind: kind.name)
def test_bits_are_those_of_torch(kind: ElementType) -> None:
    assert torch.empty(0, dtype=getattr(torch, kind.name)).element_size() * 8 == kind.bits


@pytest.mark.parametrize("kind", [k for k in ELEMENT_TYPES if k.onnx], ids=lambda kind: kind.name)
def test_numbers_are_those_of_onnx(kind: ElementType) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.onnx)
    known = np.dtype(dtype).name
    assert known == kind.name or known.replace("float4_e2m1fn", kind.name) == kind.name


@pytest.mark.parametrize("kind", PROGRAM_TYPES, ids=lambda kind: kind.name)
def test_names_are_those_of_safetensors(kind: ElementType, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=getattr(torch, kind.name))}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.get_slice("x").get_dtype() == kind.safetensors


def test_no_name_stands_for_two_types() -> None:
    for column in ("name", "safetensors", "onnx", "short"):
        values = [value for kind in ELEMENT_TYPES if (value := getattr(kind, column))]
        assert len(values) == len(set(values)), column

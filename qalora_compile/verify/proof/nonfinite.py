"""Stored tensors with NaN, or with infinities outside of masks, which nothing is equal to.

The rule is that of `ir.finite`, for numpy: −∞ is intended only in masks, which have no positive
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_compile.untrusted.artifacts import ort_files
from qalora_compile.untrusted.element_types import FLOATS
from qalora_compile.untrusted.ort_file import check_ort
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.open_graph import open_graphs

_FLOATS = {1: np.float32, 10: np.float16, 11: np.float64}
"""The floats of `onnx.TensorProto.DataType` that numpy has."""

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program


def is_damaged(stored: StoredTensor) -> bool:
    """Whether a tensor holds NaN, or infinities and is not a mask."""
    if stored.dtype not in FLOATS or stored.size == 0:
        return False
    return _damaged(stored.values())


def _damaged(values: Any) -> bool:
    return not (bool(np.isfinite(values).all()) or bool((values <= 0).all()))


def damages(graphs: Iterable[Graph]) -> list[str]:
    """A line for each damaged tensor of the graphs."""
    return [
        f"{graph.label}: the tensor {name} holds NaN or infinite values"
        for graph in graphs
        for name, stored in graph.tensors.items()
        if is_damaged(stored)
    ]


def damages_of(*things: Program | str | Path) -> list[str]:
    """`damages` for programs and paths.

    Raises:
        UserInputError: a path cannot be read.
    """
    found = []
    for thing in things:
        files = ort_files(thing) if isinstance(thing, (str, Path)) else []
        found += [line for file in files for line in _ort_damages(file)]
        found += [] if files else damages(open_graphs(thing))
    return found


def _ort_damages(path: Path) -> list[str]:
    """A line for each damaged tensor of a file in ONNX Runtime's own format."""
    found = []
    for name, row in check_ort(path).tensors.items():
        dtype = _FLOATS.get(row.kind)
        if dtype is None or row.inside is None:
            continue
        values = np.fromfile(path, dtype, row.size, offset=row.inside[0])
        if _damaged(values):
            found.append(f"{path}: the tensor {name} holds NaN or infinite values")
    return found

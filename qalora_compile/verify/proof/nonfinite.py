"""Stored tensors with NaN, or with infinities outside of masks, which nothing is equal to.

The rule is that of `ir.finite`, for numpy: −∞ is intended only in masks, which have no positive
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qalora_compile.untrusted.element_types import FLOATS
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor
from qalora_compile.verify.proof.open_graph import open_graphs

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program


def is_damaged(stored: StoredTensor) -> bool:
    """Whether a tensor holds NaN, or infinities and is not a mask."""
    if stored.dtype not in FLOATS or stored.size == 0:
        return False
    values = stored.values()
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
    return damages(graph for thing in things for graph in open_graphs(thing))

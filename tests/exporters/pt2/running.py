"""`.pt2` files in tests, loaded by torch itself: the tests wrote them, so that they are trusted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qalora_compile.ir.torch_internals import pytree


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """The outputs for some inputs, by `torch.export.load`."""
    loaded = torch.export.load(path).module()
    return [leaf for leaf in pytree.tree_leaves(loaded(*inputs)) if isinstance(leaf, Tensor)]


def calls(path: Path) -> list[str]:
    """The names of the operators of a file."""
    nodes = torch.export.load(path).graph.nodes
    return [str(node.target) for node in nodes if node.op == "call_function"]

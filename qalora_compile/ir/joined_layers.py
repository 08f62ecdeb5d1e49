"""Layers of one input that a single GroupQuantLinear computes: which rows of it each one is."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.target_kernels import GroupQuantLinear
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.spec import GROUP_QUANT_LINEAR

SPLIT = torch.ops.aten.split_with_sizes.default
CODES = ".qweight"


@dataclass(frozen=True)
class JoinedRows:
    """The rows of one layer.

    Attributes:
        path: Path of the joined tensors.
        index: Number of the layer among those joined.
        share: The layer's part of all rows.
    """

    path: str
    index: int
    share: float

    @property
    def codes(self) -> str:
        """Name of the joined codes."""
        return f"{self.path}{CODES}"


def joined_layers(graph: fx.Graph) -> dict[str, JoinedRows]:
    """Site → its rows, for every site that `fuse-shared-input` has joined with others."""
    found = {}
    for node in graph.nodes:
        site = site_of(node)
        if site is None:
            continue
        biased = node.target is torch.ops.aten.add.Tensor
        rows = _rows(argument(node, "self") if biased else node)
        if rows is not None:
            found[site] = rows
    return found


def _rows(part: object) -> JoinedRows | None:
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return None
    split, index = argument(part, "a"), argument(part, "b")
    if not isinstance(split, fx.Node) or split.target is not SPLIT:
        return None
    layer = argument(split, "self")
    if not isinstance(layer, fx.Node) or layer.target is not GROUP_QUANT_LINEAR:
        return None
    sizes = argument(split, "split_sizes")
    path = str(GroupQuantLinear.of(layer).codes.target).removesuffix(CODES)
    return JoinedRows(path, index, sizes[index] / sum(sizes))

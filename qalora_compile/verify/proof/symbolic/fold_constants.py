"""Computes sums and products of stored tensors, as the export does before it writes them.

IEEE 754 rounds each of these to one number, so that all who compute it in float32 find the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qalora_compile.untrusted.element_types import HALVES
from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Ref, Tensor
from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor, from_array

_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "aten.add.Tensor": np.add,
    "aten.sub.Tensor": np.subtract,
    "aten.mul.Tensor": np.multiply,
}
_WIDENED = "aten.to.dtype"
_LARGEST = 1 << 20
"""Larger tensors stay as they are."""


class FoldedConstants:
    """Values of a program that are computed from stored tensors alone.

    Args:
        graph: The program; values of exports are not folded.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[str, StoredTensor] = {}

    def of(self, node: Node) -> StoredTensor | None:
        """The value of a node, if it is a float32 sum, difference or product of known values."""
        if self._graph.dialect != FX or node.options or len(node.args) != 2:
            return None
        one, other = node.args
        found = None
        if node.op == _WIDENED:
            found = self._array(one, widen=True) if other == "float32" else None
        elif node.op in _FUNCTIONS and any(isinstance(arg, (Ref, Tensor)) for arg in node.args):
            values = [self._array(arg, widen=False) for arg in node.args]
            if not any(value is None for value in values):
                found = _FUNCTIONS[node.op](*values)
        if found is None:
            return None
        self._known[node.name] = from_array(node.name, found)
        return self._known[node.name]

    def _array(self, operand: Any, *, widen: bool) -> Array | None:
        """An operand in float32; half precision only to widen it, as arithmetic would round."""
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            number = np.asarray(operand, np.float32)
            return number if float(number) == operand else None
        if isinstance(operand, Tensor):
            tensor = self._graph.tensors[operand.name]
        elif isinstance(operand, Ref) and operand.name in self._known:
            tensor = self._known[operand.name]
        else:
            return None
        kinds = ("float32", *HALVES) if widen else ("float32",)
        return tensor.values() if tensor.dtype in kinds and tensor.size <= _LARGEST else None

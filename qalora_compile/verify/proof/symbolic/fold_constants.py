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
    "aten.div.Tensor": np.divide,
    "aten.reciprocal.default": np.reciprocal,
    "aten.sqrt.default": np.sqrt,
}
_SAME = ("alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy")
_COPIES = tuple(f"aten.{op}.default" for op in _SAME)
_POWER = ("aten.pow.Tensor_Tensor", "aten.pow.Scalar")
_WIDENED, _RANGE = "aten.to.dtype", "aten.arange.start"
_HALF = 0.5
"""What `frexp` calls the mantissa of a power of two."""
_LARGEST = 1 << 20
"""Larger tensors stay as they are."""
_EXACT = 1 << 24
"""float32 holds every integer up to this one."""


class FoldedConstants:
    """Values of a program that are computed from stored tensors alone.

    Args:
        graph: The program; values of exports are not folded.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[str, StoredTensor] = {}

    def of(self, node: Node) -> StoredTensor | None:
        """The value of a node, if float32 or exact arithmetic finds it from known values."""
        if self._graph.dialect != FX:
            return None
        found = self._listed(node) if node.options or node.op in _POWER else self._computed(node)
        if found is None:
            return None
        self._known[node.name] = from_array(node.name, found)
        return None if node.op == _RANGE else self._known[node.name]  # it stays one of positions

    def _computed(self, node: Node) -> Array | None:
        """A sum, difference, product, quotient or root, each of which is rounded once."""
        if node.op in _COPIES and len(node.args) == 1:
            (copied,) = node.args
            return self._array(copied, ("float32", "int64", "int32"))
        if node.op == _WIDENED and len(node.args) == 2:
            operand, dtype = node.args
            return self._in_float32(operand) if dtype == "float32" else None
        if node.op not in _FUNCTIONS:
            return None
        if not any(isinstance(arg, (Ref, Tensor)) for arg in node.args):
            return None
        values = [self._array(arg, ("float32",)) for arg in node.args]
        return None if any(value is None for value in values) else _FUNCTIONS[node.op](*values)

    def _listed(self, node: Node) -> Array | None:
        """Numbers that operands of the node state; or powers that float32 holds exactly."""
        if node.op == _RANGE and all(type(arg) is int for arg in node.args):
            first, last, *_ = (*node.args, 0, 0)
            exact = node.get("dtype") in ("int64", "int32") and 0 <= last - first <= _LARGEST
            return np.arange(first, last) if exact and len(node.args) == 2 else None
        if node.op == "aten.full.default" and node.get("dtype") == "float32":
            sizes, value = node.args
            return np.asarray(value, np.float32) if sizes == () else None
        if node.op not in _POWER or node.options:
            return None
        base, exponent = (self._array(arg, ("float32", "int64")) for arg in node.args)
        if base is None or exponent is None or base.size * exponent.size > _LARGEST:
            return None
        found = np.power(base.astype(np.float64), exponent.astype(np.float64))
        short = found.astype(np.float32)
        exact = (np.frexp(base)[0] == _HALF).all() and (short == found).all() and short.all()
        return short if bool(exact) else None

    def _in_float32(self, operand: Any) -> Array | None:
        """Half precision or small integers as float32, which holds them exactly."""
        found = self._array(operand, ("float32", "int64", "int32", *HALVES))
        if found is None or (found.dtype.kind == "i" and bool((abs(found) > _EXACT).any())):
            return None
        return found.astype(np.float32)

    def _array(self, operand: Any, kinds: tuple[str, ...]) -> Array | None:
        """An operand of one of these dtypes; half precision is as `StoredTensor` widens it."""
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            number = np.asarray(operand, np.float32)
            return number if float(number) == operand else None
        if isinstance(operand, Tensor):
            tensor = self._graph.tensors[operand.name]
        elif isinstance(operand, Ref) and operand.name in self._known:
            tensor = self._known[operand.name]
        else:
            return None
        return tensor.values() if tensor.dtype in kinds and tensor.size <= _LARGEST else None

"""Recognition of linear maps by a parameter in an ATen graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qalora_compile.ir.meta import shape_of

_ATEN = torch.ops.aten
_SWAPS = (_ATEN.t.default, _ATEN.numpy_T.default, _ATEN.transpose.int, _ATEN.permute.default)

LINEAR = "linear"
ADDMM = "addmm"
MATMUL = "matmul"


def get_tensor(module: torch.nn.Module, target: str) -> Tensor | None:
    """The tensor at a dotted path, or None where there is none."""
    owner_path, _, leaf = target.rpartition(".")
    try:
        value = getattr(module.get_submodule(owner_path), leaf)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


@dataclass(frozen=True)
class WeightRef:
    """A parameter as read by a node: its name, and whether through an odd number of transposes."""

    target: str
    node: fx.Node
    swapped: bool


@dataclass(frozen=True)
class LinearMap:
    """A node that computes x Wᵀ (+ bias) with a parameter W.

    Attributes:
        node: The node that computes y.
        x: The node that gives x, `[.., K]`.
        weight: The parameter.
        bias: Node of the bias, or None.
        kind: `linear`, `addmm` or `matmul`.
        transposed: The parameter is stored `[K, N]`.
    """

    node: fx.Node
    x: fx.Node
    weight: WeightRef
    bias: fx.Node | None
    kind: str
    transposed: bool


def resolve_weight(node: object) -> WeightRef | None:
    """Follow transposes of a two-dimensional value back to the `get_attr` of a parameter."""
    swapped = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return WeightRef(str(node.target), node, swapped)
        if node.op != "call_function" or node.target not in _SWAPS or not _swaps_two(node):
            return None
        swapped = not swapped
        node = node.args[0]
    return None


def _swaps_two(node: fx.Node) -> bool:
    """Whether a transpose-like node exchanges the two axes of a matrix."""
    if node.target is _ATEN.transpose.int:
        return {int(a) % 2 for a in node.args[1:3]} == {0, 1}  # type: ignore[arg-type]
    if node.target is _ATEN.permute.default:
        order = node.args[1]
        return isinstance(order, (list, tuple)) and [int(a) % 2 for a in order] == [1, 0]  # type: ignore[arg-type]
    return True


def _is_vector(bias: object) -> bool:
    """Whether what addmm adds can be a bias `[N]`; a whole matrix `[M, N]` is none.

    A stored tensor passes here without a recorded shape: annotate-linears looks at the tensor.
    """
    if not isinstance(bias, fx.Node):
        return False
    shape = shape_of(bias)
    return bias.op == "get_attr" if shape is None else len(shape) == 1


def match_linear(node: fx.Node) -> LinearMap | None:
    """The linear map that `node` computes with a parameter, or None.

    Fires on `aten.linear(x, W, b)`, `aten.addmm(b, x, W)` with alpha = beta = 1, `aten.mm(x, W)`
    and `aten.matmul(x, W)`; W may be read through transposes.
    """
    if node.op != "call_function":
        return None
    args = node.args
    x: object
    bias: object = None
    if node.target is _ATEN.linear.default:
        kind, x, weight, stored_kn = LINEAR, args[0], args[1], False
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
    elif node.target is _ATEN.addmm.default:
        scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
        if scaled or not _is_vector(args[0]):
            return None
        kind, bias, x, weight, stored_kn = ADDMM, args[0], args[1], args[2], True
    elif node.target in (_ATEN.mm.default, _ATEN.matmul.default):
        kind, x, weight, stored_kn = MATMUL, args[0], args[1], True
    else:
        return None
    ref = resolve_weight(weight)
    if resolve_weight(x) is not None:  # two weights multiplied: no activation to group
        return None
    if ref is None or not isinstance(x, fx.Node) or not isinstance(bias, (fx.Node, type(None))):
        return None
    return LinearMap(node, x, ref, bias, kind, stored_kn ^ ref.swapped)

"""Recognition of linear maps by a parameter in an ATen graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.ops.views import arguments
from qalora_compile.ir.torch_internals import SOFTMAX, TO_COPY

_ATEN = torch.ops.aten
_VIEWS = frozenset(
    {
        _ATEN.t.default,
        _ATEN.numpy_T.default,
        _ATEN.mT.default,
        _ATEN.transpose.int,
        _ATEN.permute.default,
        _ATEN.view.default,
        _ATEN.reshape.default,
        _ATEN.flatten.using_ints,
        _ATEN.unflatten.int,
        _ATEN.squeeze.default,
        _ATEN.squeeze.dim,
        _ATEN.squeeze.dims,
        _ATEN.unsqueeze.default,
        _ATEN.select.int,
        _ATEN.slice.Tensor,
        _ATEN.narrow.default,
        _ATEN.split.Tensor,
        _ATEN.split_with_sizes.default,
        _ATEN.chunk.default,
        _ATEN.unbind.int,
        _ATEN.contiguous.default,
        _ATEN.alias.default,
        _ATEN.detach.default,
        operator.getitem,
    }
)
_GROUPED = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")

LINEAR = "linear"
ADDMM = "addmm"
MATMUL = "matmul"
EXPERTS = "experts"
_PRODUCTS = {
    _ATEN.mm.default: MATMUL,
    _ATEN.matmul.default: MATMUL,
    _ATEN.bmm.default: EXPERTS,
}


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
    """A parameter as read by a node, through any number of views.

    Attributes:
        target: Name of the parameter.
        node: The `get_attr` that reads it.
        views: The nodes between, from the parameter outwards.
    """

    target: str
    node: fx.Node
    views: tuple[fx.Node, ...] = ()

    def read(self, tensor: Tensor) -> Tensor:
        """Apply the views to the parameter; the result shares its memory where torch's views do."""
        value: Any = tensor
        for view in self.views:
            _, *options = view.args
            value = view.target(value, *options, **view.kwargs)  # type: ignore[operator]
        assert isinstance(value, Tensor), "the last of the views gives one tensor"
        return value


@dataclass(frozen=True)
class LinearMap:
    """A node that computes x Wᵀ (+ bias) with a parameter W.

    Attributes:
        node: The node that computes y.
        x: The node of x, `[.., K]`; for experts `[E, T, K]` or, with `group_offsets`, `[T, K]`.
        weight: The parameter.
        bias: Node of the bias, or None.
        kind: `linear`, `addmm`, `matmul`, or `experts` (one matrix for each of E experts).
        flipped: The node reads W as `[K, N]`, not `[N, K]`.
        group_offsets: For experts that share the rows of x: the node with the end of each expert's
            rows, `[E]`.
    """

    node: fx.Node
    x: fx.Node
    weight: WeightRef
    bias: fx.Node | None
    kind: str
    flipped: bool
    group_offsets: fx.Node | None = None

    def matrix(self, tensor: Tensor) -> Tensor:
        """W as `[N, K]`, or `[E, N, K]`, from the parameter; a view of it where possible."""
        read = self.weight.read(tensor)
        return read.transpose(-1, -2) if self.flipped and read.dim() > 1 else read


def resolve_weight(node: object) -> WeightRef | None:
    """Follow views back to the `get_attr` of a parameter."""
    views: list[fx.Node] = []
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return WeightRef(str(node.target), node, tuple(reversed(views)))
        if node.op != "call_function" or node.target not in _VIEWS or not _is_constant(node):
            return None
        views.append(node)
        (node,) = node.all_input_nodes
    return None


def _is_constant(view: fx.Node) -> bool:
    """Whether a view depends on nothing but its tensor."""
    first, *_ = view.args
    return view.all_input_nodes == [first]


def _is_vector(bias: object) -> bool:
    """Whether the operand that addmm adds can be a bias `[N]`; a full matrix `[M, N]` cannot.

    A stored tensor passes even without a recorded shape: annotate-linears looks at the tensor.
    """
    if not isinstance(bias, fx.Node):
        return False
    shape = shape_of(bias)
    return bias.op == "get_attr" if shape is None else len(shape) == 1


def match_linear(node: fx.Node) -> LinearMap | None:
    """The linear map that `node` computes with a parameter, or None.

    Fires on `aten.linear(x, W, b)`, `aten.addmm(b, x, W)` with alpha = beta = 1, `aten.mm(x, W)`,
    `aten.matmul(x, W)`, and on the products of stacked experts, `aten.bmm(x, W)` and
    `grouped_mm(x, W, group_offsets)`; W may be read through views. The caller has to check the
    dimensions of W, which the graph does not hold.
    """
    parts = _operands(node) if node.op == "call_function" else None
    if parts is None:
        return None
    kind, x, weight, bias, group_offsets = parts
    ref = resolve_weight(weight)
    if resolve_weight(x) is not None:  # two weights multiplied: no activation to group
        return None
    if ref is None or not isinstance(x, fx.Node) or not isinstance(bias, (fx.Node, type(None))):
        return None
    return LinearMap(node, x, ref, bias, kind, kind != LINEAR, group_offsets)


_Operands = tuple[str, object, object, object, "fx.Node | None"]


def _operands(node: fx.Node) -> _Operands | None:
    """Kind, x, W, bias and group offsets of a node that may be a linear map."""
    if node.target is _ATEN.linear.default:
        x, weight, bias = arguments(node).values()
        return LINEAR, x, weight, bias, None
    if node.target is _ATEN.addmm.default:
        bias, x, weight, *factors = arguments(node).values()
        usable = factors == [1, 1] and _is_vector(bias)
        return (ADDMM, x, weight, bias, None) if usable else None
    kind = _PRODUCTS.get(node.target)  # type: ignore[call-overload]
    if kind is not None:
        x, weight = list(arguments(node).values())[:2]
        return kind, x, weight, None, None
    return _grouped_operands(node) if str(node.target) in _GROUPED else None


def _grouped_operands(node: fx.Node) -> _Operands | None:
    x, weight, group_offsets, *others = arguments(node).values()
    if not isinstance(group_offsets, fx.Node) or any(v is not None for v in others):
        return None
    return EXPERTS, x, weight, None, group_offsets


_PASSED_ON = _VIEWS | {
    _ATEN.softmax.int,
    SOFTMAX,
    _ATEN.sigmoid.default,
    _ATEN.softplus.default,
    _ATEN.to.dtype,
    TO_COPY.default,
    _ATEN.type_as.default,
    _ATEN.clone.default,
    _ATEN.add.Tensor,
    _ATEN.div.Tensor,
    _ATEN.mul.Tensor,
}


def feeds_topk(node: fx.Node) -> bool:
    """Whether the values of `node`, or scores made of them one by one, are ranked by `topk`.

    A mixture of experts chooses so. A router must not be quantized by default, since a small error
    sends a token to another expert.
    """
    open_nodes, seen = [node], {node}
    while open_nodes:
        for user in open_nodes.pop().users:
            if user.target is _ATEN.topk.default:
                return True
            if user.target in _PASSED_ON and user not in seen:
                seen.add(user)
                open_nodes.append(user)
    return False

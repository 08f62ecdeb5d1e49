"""Every use of every weight in a graph, on which annotate-linears decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qalora_compile.ir.meta import module_path, shape_of
from qalora_compile.ir.ops.views import arguments
from qalora_compile.ir.pattern import (
    EXPERTS,
    MATMUL,
    LinearMap,
    get_tensor,
    match_linear,
    resolve_weight,
)
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.site_plan import EMBEDDING, KEEP, Site
from qalora_compile.ir.spec import ON_CODES
from qalora_compile.ir.stages import CODE_NAMES, TRAINED_NAMES
from qalora_compile.ir.tensor_identity import memory_key, storage_key

_ATEN = torch.ops.aten
_RAW = "_quantized"
"""Added to the path of a parameter that is not named `weight`, so that both can exist."""

KIND = "qalora_kind"
"""Metadata key of a node: the kind of layer that a canonicalizing pass replaced."""

POINTWISE = "pointwise"
"""The kind of a 1×1 convolution."""


@dataclass(frozen=True)
class Use:
    """One node that reads a parameter with two or more dimensions.

    Attributes:
        node: The node.
        weight: Name of the parameter.
        tensor: The parameter.
        storage: Number of its storage.
        linear: The linear map that the node computes, or None.
        matrix: The factor of the product, as a view `[N, K]` (`[E, N, K]` for experts).
        problem: Why `linear` is None.
    """

    node: fx.Node
    weight: str
    tensor: Tensor
    storage: int
    linear: LinearMap | None
    matrix: Tensor | None
    problem: str

    @property
    def reading(self) -> tuple[object, ...] | None:
        """Equal for uses that multiply by the same elements in the same orientation."""
        return None if self.matrix is None else storage_key(self.matrix)


def find_uses(graph: fx.Graph, module: nn.Module) -> list[Use]:
    """Every reader of every parameter with two or more dimensions, in graph order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    storages: dict[tuple[object, ...], int] = {}
    uses = []
    for source in graph.nodes:
        tensor = get_tensor(module, str(source.target)) if source.op == "get_attr" else None
        if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
            continue
        storage = storages.setdefault(storage_key(tensor), len(storages))
        uses += [_look_at(reader, source, tensor, storage, module) for reader in _readers(source)]
    return sorted(uses, key=lambda use: order[use.node])


def _readers(source: fx.Node) -> list[fx.Node]:
    """Nodes that read a parameter, directly or through views; each once."""
    found: dict[fx.Node, None] = {}
    for user in source.users:
        through = resolve_weight(user) if user.users else None
        found |= dict.fromkeys(_readers(user) if through is not None else [user])
    return list(found)


def _look_at(
    reader: fx.Node, source: fx.Node, tensor: Tensor, storage: int, module: nn.Module
) -> Use:
    linear = match_linear(reader)
    problem = "" if linear is not None else _why_not(reader, tensor)
    matrix = None
    if linear is not None:
        matrix = linear.matrix(tensor.detach())
        problem = _misfit(linear, source, tensor, matrix, module)
    if problem:
        linear = matrix = None
    return Use(reader, str(source.target), tensor, storage, linear, matrix, problem)


def _misfit(
    linear: LinearMap, source: fx.Node, tensor: Tensor, matrix: Tensor, module: nn.Module
) -> str:
    """Why a node that looks like a linear map is not supported; empty if it is."""
    name = operator_name(linear.node)
    if not tensor.is_floating_point():
        return f"{dtype_name(tensor.dtype)} values, which are not quantized"
    if linear.weight.node is not source:
        return f"read by {name} as its input or bias"
    if not _adds_a_vector(linear, module):
        return f"{name} adds a full matrix, which is not a bias"
    if memory_key(matrix) != memory_key(tensor):
        return f"read by {name} through a copy in another layout"
    rank = len(shape_of(linear.x) or ())
    if matrix.dim() == 2 and linear.kind != EXPERTS:
        return ""
    wanted = 2 if linear.group_offsets is not None else 3
    unknown = (0,) if linear.kind == EXPERTS else ()  # these operators accept only that rank
    if matrix.dim() == 3 and linear.kind in (EXPERTS, MATMUL) and rank in (wanted, *unknown):
        return ""
    return f"{name} multiplies {rank} dimensions by a weight of {matrix.dim()}"


def _adds_a_vector(linear: LinearMap, module: nn.Module) -> bool:
    """Whether the bias, if it is a stored tensor, has one value for each output."""
    bias = linear.bias
    stored = get_tensor(module, str(bias.target)) if bias is not None else None
    return stored is None or stored.dim() == 1


def _why_not(reader: fx.Node, tensor: Tensor) -> str:
    """Why a reader is not a linear map by the parameter."""
    name = operator_name(reader)
    if name.startswith("conv"):
        return _why_no_conv(reader, name, tensor)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return f"recurrent weight: {name} reads it at every step, inside one operator"
    if name == "embedding":
        return "table of an embedding: its rows are looked up, not multiplied"
    if name in ("mm", "matmul", "bmm"):
        return f"{name} multiplies by it from the left"
    if name == "output":
        return "returned as it is"
    if name == "linear":
        return "read by linear as its input or bias"
    return f"read by {name}, which is not a linear map"


def _why_no_conv(reader: fx.Node, name: str, tensor: Tensor) -> str:
    kernel = "×".join(map(str, tensor.shape[2:]))
    if set(tensor.shape[2:]) != {1}:
        return f"{name} with a {kernel} kernel, which is not a linear map of one position"
    for what, value, plain in conv_options(reader):
        if value != plain and not (isinstance(value, (list, tuple)) and set(value) == {plain}):
            return f"1×1 {name} with {what} {value}"
    return f"1×1 {name}: canonicalize-pointwise, run before, makes it a linear map"


def conv_options(node: fx.Node) -> list[tuple[str, object, int]]:
    """Name, value and plain value of a convolution's stride, padding and groups."""
    known = {"stride": 1, "padding": 0, "groups": 1}
    own = arguments(node)
    return [(name, own.get(name, plain), plain) for name, plain in known.items()]


def name_rows(uses: list[Use], tensors: Collection[str]) -> list[Site]:
    """Undecided rows of the plan, one for each use: unique names, one path for each reading.

    Args:
        uses: All uses in the graph.
        tensors: Names of the graph's tensors, which those of a quantized weight must not repeat.
    """
    taken: Counter[str] = Counter()
    paths: dict[str, object] = {}
    rows = []
    for use in uses:
        path = owner_path(use.weight)
        shown = _shown_path(path.removesuffix(_RAW), module_path(use.node))
        if use.matrix is not None and use.matrix.numel() != use.tensor.numel():
            piece = _piece(use)
            path, shown = f"{path}.{piece}", f"{shown}.{piece}"
        while _is_taken(path, use, paths, tensors):
            path += _RAW
        paths[path] = use.reading
        taken[shown] += 1
        name = shown if taken[shown] == 1 else f"{shown}@{taken[shown]}"
        rows.append(_row(use, name, path))
    return rows


def _is_taken(path: str, use: Use, paths: Mapping[str, object], tensors: Collection[str]) -> bool:
    """Whether another reading has the path, or the model has a tensor where ours would go."""
    if use.reading is None:
        return False
    own = any(f"{path}.{part}" in tensors for part in (*CODE_NAMES, *TRAINED_NAMES))
    return own or paths.get(path, use.reading) != use.reading


def _row(use: Use, name: str, path: str) -> Site:
    linear, matrix = use.linear, use.matrix
    kind = operator_name(use.node)
    if linear is not None and matrix is not None:
        kind = EXPERTS if matrix.dim() == 3 else use.node.meta.get(KIND, linear.kind)
    return Site(
        name=name,
        path=path,
        weight=use.weight,
        storage=use.storage,
        kind=kind,
        k=0 if matrix is None else matrix.shape[-1],
        n=0 if matrix is None else matrix.shape[-2],
        experts=matrix.shape[0] if matrix is not None and matrix.dim() == 3 else None,
        dtype=dtype_name(use.tensor.dtype),
        transposed=matrix is not None and matrix.stride(-1) > matrix.stride(-2),
        decision=KEEP,
        reason=use.problem,
    )


def owner_path(weight: str) -> str:
    """Module path under which a weight's quantized tensors are stored."""
    for suffix in (".weight", "_weight"):
        if weight.endswith(suffix):
            return weight.removesuffix(suffix)
    return f"{weight}{_RAW}"


def _piece(use: Use) -> str:
    """Name of a part of a packed weight: `q`, `k`, `v` in attention's in_proj, else by position."""
    matrix, tensor = use.matrix, use.tensor
    assert matrix is not None
    start = matrix.storage_offset() - tensor.storage_offset()
    if use.weight.endswith("in_proj_weight") and matrix.stride() == tensor.stride():
        third = tensor.shape[0] // 3
        first = start // tensor.stride(0)
        if first % third == 0 and matrix.shape[0] % third == 0:
            return "qkv"[first // third : (first + matrix.shape[0]) // third]
    return f"from_{start}"


def _shown_path(path: str, caller: str | None) -> str:
    """The name to show: the weight's own path, unless another module uses it as its own (a tie)."""
    if not caller or path == caller or path.startswith(f"{caller}."):
        return path
    return caller


def operator_name(node: fx.Node) -> str:
    """Name of the operator that a node calls, without namespace and overload."""
    if node.op == "output":
        return "output"
    parts = str(node.target).split(".")  # namespace.name.overload
    return parts[1] if len(parts) == 3 else parts[-1]


def find_heads(uses: Sequence[Use]) -> set[fx.Node]:
    """The heads: linear maps of a table's shape `[V, K]` whose outputs reach no other layer.

    A head may be tied to the table, that is, share its memory, or not.
    """
    tables = {tuple(use.tensor.shape) for use in uses if operator_name(use.node) == EMBEDDING}
    layers = {use.node for use in uses if use.linear is not None}
    return {
        use.node
        for use in uses
        if use.matrix is not None
        and tuple(use.matrix.shape) in tables
        and not _reaches(use.node, layers - {use.node})
    }


def _reaches(node: fx.Node, layers: set[fx.Node]) -> bool:
    """Whether the value of `node` reaches another layer, in float or quantized."""
    open_nodes, seen = [node], {node}
    while open_nodes:
        for user in open_nodes.pop().users:
            if user in layers or user.target in ON_CODES:
                return True
            if user not in seen:
                seen.add(user)
                open_nodes.append(user)
    return False

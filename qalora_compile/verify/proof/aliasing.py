"""Refuses in-place operators whose effect the graph's edges do not show.

A proof follows operands. After `y.relu_()`, a reader of the result reads the written values. A
reader of y itself, or of a view of it, does so only because of the order of nodes, which operands
do not show.
"""

from __future__ import annotations

from collections.abc import Collection

from qalora_compile.errors import UserInputError
from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Ref, refs

# fmt: off
_FRESH = {
    "abs", "add", "addmm", "arange", "avg_pool2d", "baddbmm", "batch_norm", "bmm", "cat",
    "clone", "conv1d", "conv2d", "conv3d", "convolution", "cos", "cumsum", "div", "embedding",
    "empty_like", "erf", "exp", "full", "full_like", "gelu", "group_norm", "hardtanh", "index",
    "instance_norm", "layer_norm", "leaky_relu", "lift_fresh_copy", "linear", "log", "masked_fill",
    "matmul", "max_pool2d", "mean", "mm", "mul", "neg", "ones", "ones_like", "pow", "reciprocal",
    "relu", "rms_norm", "rsqrt", "sigmoid", "silu", "sin", "softmax", "sqrt", "stack", "sub",
    "sum", "tanh", "where", "zeros", "zeros_like",
}
_FRESH_PARTS = {"sort", "topk"}
# fmt: on
"""ATen operators that allocate their result; and those that allocate each of several."""
_VIEWS = {"movedim", "permute", "reshape", "t", "transpose", "unflatten", "unsqueeze", "view"}
"""Operators that may return the same elements, each of them once."""
_IDLE = frozenset({"detach_", "dropout_"})
"""In-place operators that write nothing in evaluation mode."""


def refuse_hidden_writes(graph: Graph) -> None:
    """Check that what an in-place operator writes is read only through its result.

    Raises:
        UserInputError: an operator writes into an input, a stored tensor, a view, or a value that
            is also read elsewhere.
    """
    if graph.dialect != FX:
        return
    readers = _readers(graph)
    place = {name: index for index, name in enumerate(graph.nodes)}
    shown: set[str] = set()
    for name, node in graph.nodes.items():
        if not _writes(node.op):
            continue
        if _is_shown(graph, node, readers, place, shown):
            shown.add(name)
        elif _base(node.op) not in _IDLE:
            raise UserInputError(
                f"an operator writes into a tensor that is also read elsewhere: {node.line}",
                where=f"{graph.label}{f', module {node.path}' if node.path else ''}",
                hint="write the step without changing a tensor in place (torch.where, "
                "slice_scatter, y = y + x), so that the comparison can follow it",
            )


def _writes(op: str) -> bool:
    base, overload = _base(op), op.rpartition(".")[2]
    in_place = base.endswith("_") and not base.endswith("__")
    return in_place or overload == "out" or overload.endswith("_out")


def _base(op: str) -> str:
    return op.split(".")[1] if op.count(".") > 1 else op.rpartition(".")[2]


def _readers(graph: Graph) -> dict[str, list[str]]:
    """The names of the nodes that read each value, with "" for the outputs."""
    found: dict[str, list[str]] = {}
    for name, node in graph.nodes.items():
        for ref in (*refs(node.args), *refs(dict(node.options))):
            found.setdefault(ref.name, []).append(name)
    for ref in refs(tuple(graph.outputs.values())):
        found.setdefault(ref.name, []).append("")
    return found


def _is_shown(
    graph: Graph,
    node: Node,
    readers: dict[str, list[str]],
    place: dict[str, int],
    shown: Collection[str],
) -> bool:
    written, *_ = (*node.args, None)
    owner = graph.node(written)
    if not isinstance(written, Ref) or owner is None:
        return False
    reader = node
    while owner is not None and _read_before(graph, reader, readers, place, owner.name):
        if owner.name in shown or _is_fresh(owner) or _is_part(graph, owner, readers):
            return True
        if not owner.op.startswith("aten.") or _base(owner.op) not in _VIEWS:
            return False
        viewed, *_ = owner.args
        reader, owner = owner, graph.node(viewed)
    return False


def _read_before(
    graph: Graph, node: Node, readers: dict[str, list[str]], place: dict[str, int], value: str
) -> bool:
    """Whether all others that read a value do so before a node, and keep no view of it."""
    others = [name for name in readers[value] if name != node.name]
    return all(
        name and place[name] < place[node.name] and _is_fresh(graph.nodes[name]) for name in others
    )


def _is_part(graph: Graph, node: Node, readers: dict[str, list[str]]) -> bool:
    """Whether it is a result of an operator that allocates several, which no other node takes."""
    if _base(node.op) != "getitem":
        return False
    whole, index = node.args
    owner = graph.node(whole)
    if owner is None or _base(owner.op) not in _FRESH_PARTS or not owner.op.startswith("aten."):
        return False
    taken = [graph.nodes[name].get("b") if name else index for name in readers[owner.name]]
    return taken.count(index) == 1


def _is_fresh(node: Node) -> bool:
    own = node.op.startswith("qalora.")  # custom operators must not return views of their operands
    return own or (node.op.startswith("aten.") and _base(node.op) in _FRESH)

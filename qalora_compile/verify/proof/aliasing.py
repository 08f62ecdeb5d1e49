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
    "empty_like", "erf", "exp", "full", "full_like", "gelu", "group_norm", "hardtanh",
    "instance_norm", "layer_norm", "leaky_relu", "linear", "log", "masked_fill", "matmul",
    "max_pool2d", "mean", "mm", "mul", "neg", "ones", "ones_like", "pow", "reciprocal", "relu",
    "rms_norm", "rsqrt", "sigmoid", "silu", "sin", "softmax", "sqrt", "stack", "sub", "sum",
    "tanh", "where", "zeros", "zeros_like",
}
# fmt: on
"""ATen operators that allocate their result."""
_IDLE = frozenset({"dropout_"})
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
    if owner.name not in shown and not _is_fresh(owner):
        return False
    others = [name for name in readers[written.name] if name != node.name]
    return all(
        name and place[name] < place[node.name] and _is_fresh(graph.nodes[name]) for name in others
    )


def _is_fresh(node: Node) -> bool:
    own = node.op.startswith("qalora.")  # custom operators must not return views of their operands
    return own or (node.op.startswith("aten.") and _base(node.op) in _FRESH)

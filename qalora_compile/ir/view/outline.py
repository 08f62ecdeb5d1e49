"""A program's graph without its weights: the content of DOT, SVG and Netron files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import module_path, site_of
from qalora_compile.ir.program import Program
from qalora_compile.ir.shape_propagation import propagate
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.torch_internals import OpOverload, schema_of

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Value:
    """The value of a node; `dtype` is None if it is not a tensor."""

    name: str
    dtype: str | None
    shape: Shape = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" if self.dtype else "number"


@dataclass(frozen=True)
class Box:
    """A node.

    Attributes:
        value: The value that it computes.
        domain: `qalora`, `aten` …; `input` and `output` for those of the program.
        op: Name of the operator.
        path: Site, or module path in the user's model, or "".
        reads: Names of the values that it takes, in order.
        stored: Argument → the stored tensor that it takes, as text.
        options: Argument → any other argument, as text.
    """

    value: Value
    domain: str
    op: str
    path: str
    reads: tuple[str, ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()


INPUT, OUTPUT = "input", "output"


def outline(program: Program, only: str | None = None) -> list[Box]:
    """The nodes of a program in graph order, with the shapes of all values.

    Args:
        program: At any stage.
        only: A site or module path: only its nodes and those below it. Values that they read from
            outside become inputs, values that are read outside become outputs.

    Raises:
        UserInputError: nothing is at or below `only`.
    """
    graph, tensors = program.copy_graph(), program.tensors()
    held = {n: tensors[str(n.target)] for n in graph.nodes if str(n.target) in tensors}
    names = propagate(graph, program, {n: t for n, t in held.items() if n.op == "get_attr"})
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    if only is not None:
        nodes = [n for n in nodes if _is_below(n, only)]
        if not nodes:
            raise UserInputError(
                f"no node is at or below {only}", hint="`inspect` lists the paths of the layers"
            )
    inside = set(nodes)
    wanted = {source for node in nodes for source in node.all_input_nodes} - inside - set(held)
    boxes = [
        Box(_value(n, names), INPUT, INPUT, _path(n))
        for n in graph.nodes
        if n in wanted or (only is None and n.op == "placeholder")
    ]
    boxes += [_box(node, held, names) for node in nodes]
    last = graph.output_node()
    outgoing = [n for n in nodes if any(user not in inside for user in n.users)]
    if only is None:
        outgoing = [n for n in last.all_input_nodes if n not in held]
        labels = dict(zip(outgoing, program.signature.outputs, strict=False))
    else:
        labels = {n: _path(n) for n in outgoing}
    boxes += [
        Box(Value(f"out_{n.name}", *_kind(n, names)), OUTPUT, labels.get(n, n.name), "", (n.name,))
        for n in outgoing
    ]
    return boxes


def _box(node: fx.Node, held: dict[fx.Node, Tensor], names: dict[str, str]) -> Box:
    reads: list[str] = []
    stored: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    for name, argument in _arguments(node):
        if isinstance(argument, fx.Node) and argument in held:
            tensor = held[argument]
            text = f"{argument.target}: {dtype_name(tensor.dtype)}{list(tensor.shape)}"
            stored.append((name, text))
        elif isinstance(argument, fx.Node):
            reads.append(argument.name)
        elif argument is not None:
            inner = [n.name for n in _nodes_in(argument) if n not in held]
            reads += inner
            options.append((name, str(argument)))
    domain, _, op = _target(node).rpartition(".")
    return Box(
        _value(node, names), domain or "python", op, _path(node), tuple(reads), tuple(stored),
        tuple(options),
    )  # fmt: skip


def _arguments(node: fx.Node) -> list[tuple[str, Any]]:
    """Arguments by their names in the operator's schema."""
    schema = schema_of(node.target) if isinstance(node.target, OpOverload) else None
    given = [] if schema is None else [a.name for a in schema.arguments]
    named = [
        (given[i] if i < len(given) else f"arg{i}", argument)
        for i, argument in enumerate(node.args)
    ]
    return [*named, *node.kwargs.items()]


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _target(node: fx.Node) -> str:
    """`aten.add` of `aten.add.Tensor`."""
    if isinstance(node.target, OpOverload):
        namespace, name = node.target.name().split("::")
        return f"{namespace}.{name.split('.')[0]}"
    return str(getattr(node.target, "__name__", node.target)).replace(".", "_")


def _value(node: fx.Node, names: dict[str, str]) -> Value:
    return Value(node.name, *_kind(node, names))


def _kind(node: fx.Node, names: dict[str, str]) -> tuple[str | None, Shape]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None, ()
    shape = [d if isinstance(d, int) else names.get(str(d), str(d)) for d in value.shape]
    return dtype_name(value.dtype), tuple(shape)


def _path(node: fx.Node) -> str:
    return site_of(node) or module_path(node) or ""


def _is_below(node: fx.Node, path: str) -> bool:
    own = _path(node).partition("@")[0]
    return own == path or own.startswith(f"{path}.")

"""One representation of torch.fx and ONNX graphs, as a proof reads them; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qalora_compile.verify.proof.graphs.operand_names import OPERANDS
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor

FX, ONNX, OPENVINO, TORCH, COREML = "fx", "onnx", "openvino", "torch", "coreml"


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by name."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """A stored tensor, by name."""

    name: str


@dataclass(frozen=True)
class Node:
    """A node that computes one value.

    Attributes:
        name: Name of the value.
        op: `aten.add.Tensor`, `qalora.group_sum.default`, `onnx.Add`, `com.microsoft.MatMulNBits`.
        args: Operands: `Ref`, `Tensor`, None, numbers, texts, and tuples of these.
        options: Keyword arguments or attributes, of the same kinds.
        line: The node as text.
        output: Index of the result, for an ONNX node with several.
        path: Module path in the user's model, where it is known.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    line: str
    output: int = 0
    path: str = ""

    @property
    def _named(self) -> dict[str, Any]:
        names = OPERANDS.get(self.op, ())
        return dict(self.options) | dict(zip(names, self.args, strict=False))

    def __getitem__(self, name: str) -> Any:
        """An operand by its name in the operator's definition, or an option.

        Raises:
            KeyError: the node has no such operand.
        """
        return self._named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An operand or option that may be absent."""
        return self._named.get(name, default)


@dataclass(frozen=True)
class SiteRow:
    """A quantized use of a weight: `[N, K]`, or E of them; `path` owns the weight."""

    name: str
    path: str
    k: int
    n: int
    dtype: str
    experts: int | None = None


@dataclass
class Graph:
    """A graph with its tensors.

    Attributes:
        dialect: `fx`, `onnx`, `openvino`, or `torch` or `coreml`, which have no nodes.
        label: What it is called in messages.
        stage: The stage of a program, or the target of an exported model.
        nodes: Nodes by the value that they compute, in graph order.
        inputs: Value → name of the input, and its dtype (None for a constant).
        outputs: Name → the value, or None.
        tensors: Stored tensors by name.
        sites: The quantized sites by name, in graph order.
        site_values: Site → the value that holds its output.
        half: Whether the model computes in half precision.
        functions: Model-local functions of an ONNX model, by (domain, name).
        extra: The exported model itself; for the body of a function, the name of its input x.
        shapes: Shapes of inputs by name, where the graph states them; dynamic axes have names.
        most: The largest size of a dynamic axis that the graph holds for, by name.
        given: Values, and stored tensors as `@name`, that are assumed to be a function of the
            inputs' shapes.
        assumed: What these assume, as conditions of a proof.
    """

    dialect: str
    label: str
    stage: str
    nodes: dict[str, Node]
    inputs: dict[str, tuple[str, str | None]]
    outputs: dict[str, Any]
    tensors: dict[str, StoredTensor]
    sites: dict[str, SiteRow]
    site_values: dict[str, str]
    half: bool = False
    functions: dict[tuple[str, str], Any] = field(default_factory=dict)
    extra: Any = None
    shapes: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    def node(self, operand: Any) -> Node | None:
        """The node that computes an operand; None for other operands."""
        return self.nodes.get(operand.name) if isinstance(operand, Ref) else None

    def line(self, operand: Any) -> str:
        """An operand as text: the node that computes it, or its name."""
        node = self.node(operand)
        if node is not None:
            return node.line + (f"  # {node.path}" if node.path else "")
        if isinstance(operand, Ref):
            return f"input {self.inputs.get(operand.name, (operand.name, None))[0]}"
        return f"@{operand.name}" if isinstance(operand, Tensor) else repr(operand)


def refs(value: Any) -> Iterator[Ref]:
    """The values that an operand refers to, also in nested tuples."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from refs(item)


def reachable(graph: Graph, targets: list[Any], stop: frozenset[str]) -> set[str]:
    """Names of the nodes that compute `targets`, up to the values `stop`."""
    seen: set[str] = set()
    waiting = [ref for target in targets for ref in refs(target)]
    while waiting:
        ref = waiting.pop()
        node = graph.nodes.get(ref.name)
        if node is None or ref.name in seen or ref.name in stop:
            continue
        seen.add(ref.name)
        waiting += refs(node.args)
        waiting += refs(dict(node.options))
    return seen


def text_of(value: Any) -> str:
    """An operand as text."""
    if isinstance(value, Ref):
        return f"%{value.name}"
    if isinstance(value, Tensor):
        return f"@{value.name}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(text_of, value))}]"
    return str(value)

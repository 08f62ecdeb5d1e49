"""Operands by name: typed views of this package's operators, and `argument` for all others.

A view is a frozen dataclass with one field for each argument of an operator's schema. It stands in
the file of its operator, below `@view_of(operator)`, which checks the fields against the schema:

    layer = GroupLinear.of(node)
    pooled = GroupSum.create(graph, layer.x, layer.group_size)

Operators of ATen have no views. `argument(node, "dim")` reads theirs by the names of the schema,
whether an argument was given by position, by name, or left to its default.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import fx

from qalora_compile.errors import InternalError
from qalora_compile.ir.torch_internals import OpOverload, overload_of, schema_of

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
_V = TypeVar("_V", bound="OperatorView")
_REQUIRED: Any = object()
_KINDS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "Tensor": ("fx.Node", fx.Node),
    "Optional[Tensor]": ("fx.Node | None", (fx.Node, type(None))),
    "List[Tensor]": ("Sequence[fx.Node]", (list, tuple)),
    "int": ("int", int),
    "float": ("float", (float, int)),
    "str": ("str", str),
    "ScalarType": ("torch.dtype", torch.dtype),
}
"""Type in a schema → the annotation of its field, and what a node may hold for it."""


@cache
def _parameters(target: Any) -> dict[str, tuple[int, Any]]:
    """Name → position and default of each argument of what a node calls."""
    if isinstance(target, OpOverload):
        pairs = [
            (a.name, a.default_value if a.has_default_value() else _REQUIRED)
            for a in schema_of(target).arguments
        ]
    elif callable(target):
        pairs = [
            (p.name, _REQUIRED if p.default is p.empty else p.default)
            for p in inspect.signature(target).parameters.values()
        ]
    else:
        raise InternalError(f"{target} is no operator: its arguments have no names")
    return {name: (place, default) for place, (name, default) in enumerate(pairs)}


def _read(node: fx.Node, name: str, place: int, default: Any) -> Any:
    args = node.args
    value = args[place] if place < len(args) else node.kwargs.get(name, default)
    if value is _REQUIRED:
        raise InternalError(f"{node.target} lacks its argument {name}", where=f"node {node.name}")
    return value


def argument(node: fx.Node, name: str) -> Any:
    """An argument of a call by its name in the operator's schema; its default where it is absent.

    Of a function of Python, such as `operator.getitem`, the names are those of its signature.

    Raises:
        InternalError: the operator has no such argument, or the node lacks one without a default.
    """
    found = _parameters(node.target).get(name)
    if found is None:
        raise InternalError(f"{node.target} has no argument {name}", where=f"node {node.name}")
    return _read(node, name, *found)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, in the order of the schema, defaults included.

    Raises:
        InternalError: see `argument`.
    """
    return {name: _read(node, name, *at) for name, at in _parameters(node.target).items()}


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Write an argument where it stands, by position or by name; by name where it was absent."""
    place, _ = _parameters(node.target)[name]
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def output_value(graph: fx.Graph) -> Any:
    """What a graph returns: a node, or a nest of nodes and constants."""
    (value,) = graph.output_node().args
    return value


@dataclasses.dataclass(frozen=True)
class OperatorView:
    """The operands of a node that calls one of this package's operators."""

    target: ClassVar[OpOverload]

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The operands of a node.

        Raises:
            InternalError: the node calls another operator, or an operand is of another type than
                the schema says.
        """
        if node.target is not cls.target:
            raise InternalError(f"{node.target} is not {cls.target}", where=f"node {node.name}")
        found = arguments(node)
        for name, (_, types) in _kinds(cls.target).items():
            if not isinstance(found[name], types):
                raise InternalError(
                    f"the operand {name} of {cls.target} is {found[name]!r}",
                    where=f"node {node.name}",
                )
        return cls(**found)

    @classmethod
    def all_in(cls, graph: fx.Graph) -> Iterator[tuple[fx.Node, Self]]:
        """Each node of the graph that calls the operator, with its operands."""
        for node in list(graph.nodes):
            if node.target is cls.target:
                yield node, cls.of(node)

    @classmethod
    def create(
        cls: Callable[P, OperatorView],
        graph: fx.Graph,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> fx.Node:
        """Insert a call of the operator; its operands are the fields, as for the view itself."""
        return cls(*args, **kwargs).insert(graph)

    def insert(self, graph: fx.Graph) -> fx.Node:
        """Insert a call of the operator on these operands at the graph's insertion point."""
        operands = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return graph.call_function(self.target, operands)


VIEWS: dict[OpOverload, type[OperatorView]] = {}
"""The view of each operator that a graph may hold."""


@cache
def _kinds(target: OpOverload) -> dict[str, tuple[str, type | tuple[type, ...]]]:
    return {a.name: _KINDS[str(a.real_type)] for a in schema_of(target).arguments}


def view_of(operator: Any) -> Callable[[type[_V]], type[_V]]:
    """Register the dataclass below as the view of an operator made by `torch.library.custom_op`.

    Raises:
        InternalError: its fields are not the arguments of the schema, in order and of their types.
    """
    target = overload_of(operator)

    def register(view: type[_V]) -> type[_V]:
        fields = {field.name: field.type for field in dataclasses.fields(view)}
        wanted = {name: annotation for name, (annotation, _) in _kinds(target).items()}
        if list(fields.items()) != list(wanted.items()):
            raise InternalError(f"{view.__name__} has the fields {fields}, {target} {wanted}")
        view.target = target
        VIEWS[target] = view
        return view

    return register

"""Shapes of every value of a program, propagated through its graph, with named axes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import InputLeaf, flatten_inputs
from qalora_compile.ir.torch_internals import (
    ASSERTIONS,
    FakeTensorMode,
    enable_python_dispatcher,
    new_size,
    symbolic_mode,
)


def without_assertions(program: Program) -> fx.Graph:
    """The graph without the model's own run-time assertions, for which ONNX has no operator."""
    graph = program.copy_graph()
    erase_unread([n for n in graph.nodes if n.target in ASSERTIONS])
    return graph


def shaped_graph(program: Program) -> fx.Graph:
    """A copy of the graph whose nodes hold their fake values in `meta["val"]`.

    Values that capture recorded are kept; a loaded program has none. A graph that cannot be
    propagated without data (a size is computed from values) is returned unchanged.
    """
    graph, tensors = program.copy_graph(), program.tensors()
    if all("val" in node.meta for node in graph.nodes if node.op == "placeholder"):
        return graph
    stored = {n: t for n in graph.nodes if (t := tensors.get(str(n.target))) is not None}
    # an operator failed, with whatever exception its author chose
    with suppress(Exception):
        propagate(graph, program, stored)
    return graph


def propagate(
    graph: fx.Graph, program: Program, tensors: Mapping[fx.Node, Tensor]
) -> dict[str, str]:
    """Record the fake tensor or symbolic number of each node in `meta["val"]`.

    Nodes that compute the same of equal shapes share one value, as those of equal layers do: so
    each kind of layer is computed once, which takes a thirtieth of the time in a model of thirty.

    Args:
        graph: The graph of the program, or a copy of it.
        program: Its signature describes the inputs; axes of one name share one symbol.
        tensors: The nodes that stand for stored tensors.

    Returns:
        Symbol → name of the axis.
    """
    mode = symbolic_mode()
    args, kwargs = program.example
    example = flatten_inputs(program.graph, [*args, *kwargs.values()])
    given = iter(zip(program.signature.inputs, example, strict=True))
    sizes: dict[str, Any] = {}
    values: dict[fx.Node, Any] = {}
    made: dict[Hashable, Any] = {}
    with mode, enable_python_dispatcher(), torch.no_grad():
        for node in graph.nodes:
            if (tensor := tensors.get(node)) is not None:
                layout = _layout(tensor)
                if layout not in made:
                    parts = tensor.shape, tensor.stride()
                    made[layout] = torch.empty_strided(*parts, dtype=tensor.dtype)
                value = made[layout]
            elif node.op == "placeholder":
                value = _fake_input(*next(given), mode, sizes)
            elif node.op == "call_function":
                call = node.target, _facts((node.args, node.kwargs), values)
                if call not in made:
                    call_args, call_kwargs = fx.node.map_arg(
                        (node.args, node.kwargs), values.__getitem__
                    )
                    value = node.target(*call_args, **call_kwargs)
                    if isinstance(value, Tensor):  # whatever computed it
                        value = made.setdefault(_layout(value), value)
                    made[call] = value
                value = made[call]
            else:
                continue
            values[node] = node.meta["val"] = value
    return {str(symbol): name for name, symbol in sizes.items()}


def _layout(tensor: Tensor) -> Hashable:
    """What is recorded of a tensor; sizes may be symbols."""
    sizes = *tensor.shape, *tensor.stride(), tensor.storage_offset()
    return tensor.dtype, tuple(map(str, sizes))


def _facts(argument: Any, values: Mapping[fx.Node, Any]) -> Hashable:
    """What a call depends on: which values, and what constants (`1`, `1.0` and `True` differ)."""
    if isinstance(argument, fx.Node):
        return "value", id(values[argument])
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_facts(each, values) for each in argument)
    if isinstance(argument, dict):
        return dict, tuple((name, _facts(each, values)) for name, each in argument.items())
    if isinstance(argument, slice):
        return slice, _facts((argument.start, argument.stop, argument.step), values)
    return type(argument), argument


def _fake_input(leaf: InputLeaf, value: Any, mode: FakeTensorMode, sizes: dict[str, Any]) -> Any:
    """An input of the signature; axes of one name have one symbol for their size."""
    if not isinstance(value, Tensor):
        return value
    shape = [
        _symbol(size, int(value.shape[axis]), mode, sizes) if isinstance(size, str) else size
        for axis, size in enumerate(leaf.shape)
    ]
    return torch.empty(shape, dtype=value.dtype)


def _symbol(name: str, hint: int, mode: FakeTensorMode, sizes: dict[str, Any]) -> Any:
    if name not in sizes:
        sizes[name] = new_size(mode, name, hint)
    return sizes[name]

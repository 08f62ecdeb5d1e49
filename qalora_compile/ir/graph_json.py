"""A torch.fx graph as JSON and back, without pickle and without tracing again.

`torch.export.save` would re-trace the rewritten graph, rename its nodes and store example inputs
as a pickle; this form keeps node names, site marks and the call signature, and reading it runs no
code: operators are looked up by qualified name in a fixed set of namespaces.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.meta import mark_site, site_of
from qalora_compile.ir.signature import argument_names, input_spec, output_spec

_DROPOUT_P = "qalora_dropout_p"
_TORCH_TYPES = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_TRUSTED_TREES = ("transformers",)
_NODE_KINDS = ("placeholder", "get_attr", "call_function", "output")
_TARGET = re.compile(r"[^\s\"'\\\\()]+")
_OPERATORS = frozenset(
    {
        "abs",
        "add",
        "and_",
        "eq",
        "floordiv",
        "ge",
        "getitem",
        "gt",
        "invert",
        "le",
        "lshift",
        "lt",
        "mod",
        "mul",
        "ne",
        "neg",
        "not_",
        "or_",
        "pos",
        "pow",
        "rshift",
        "sub",
        "truediv",
        "xor",
    }
)
"""Functions of `operator` in exported graphs; others (`attrgetter`, `call`) could run anything."""


def graph_to_json(graph: fx.Graph, module: torch.nn.Module) -> dict[str, Any]:
    """Encode a graph, its call signature and the subgraphs that it refers to.

    Raises:
        UnsupportedError: a node has an argument or target that has no JSON form.
    """
    subgraphs = {}
    nodes = []
    for node in graph.nodes:
        row: dict[str, Any] = {
            "name": node.name,
            "op": node.op,
            "target": _encode_target(node),
            "args": [_encode(a, node) for a in node.args],
        }
        if node.kwargs:
            row["kwargs"] = {k: _encode(v, node) for k, v in node.kwargs.items()}
        if (site := site_of(node)) is not None:
            row["site"] = site
        if _DROPOUT_P in node.meta:
            row["dropout_p"] = node.meta[_DROPOUT_P]
        nodes.append(row)
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(owner), leaf)
            if isinstance(value, fx.GraphModule):
                subgraphs[str(node.target)] = graph_to_json(value.graph, value)
    encoded: dict[str, Any] = {"nodes": nodes, "subgraphs": subgraphs}
    if isinstance(graph._codegen, _PyTreeCodeGen):
        encoded["tree"] = _encode_tree(graph)
    return encoded


def graph_from_json(value: Mapping[str, Any]) -> tuple[fx.Graph, dict[str, fx.GraphModule]]:
    """Decode a graph; also gives its subgraphs by target.

    Raises:
        UserInputError: the JSON is malformed or names an unknown operator.
    """
    graph = fx.Graph()
    seen: dict[str, fx.Node] = {}
    try:
        for row in value["nodes"]:
            args = tuple(_decode(a, seen) for a in row["args"])
            kwargs = {_identifier(k): _decode(v, seen) for k, v in row.get("kwargs", {}).items()}
            target = _decode_target(row["op"], row["target"])
            node = graph.create_node(row["op"], target, args, kwargs, name=row["name"])
            if "site" in row:
                mark_site(node, row["site"])
            if "dropout_p" in row:
                node.meta[_DROPOUT_P] = row["dropout_p"]
            seen[row["name"]] = node
        if "tree" in value:
            graph.set_codegen(_decode_tree(value["tree"]))
        subgraphs = {}
        for target, encoded in value["subgraphs"].items():
            inner, nested = graph_from_json(encoded)
            subgraphs[target] = fx.GraphModule(dict(nested), inner)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserInputError(f"the stored graph is malformed: {error!r}") from error
    return graph, subgraphs


def _encode_target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    text = f"{getattr(target, '__module__', '?')}.{getattr(target, '__name__', '?')}"
    if _function(text) is not target:
        raise UnsupportedError(f"the function {text} has no stored form", where=f"node {node.name}")
    return text


def _decode_target(op: str, text: str) -> Any:
    """What a node calls or names. Nothing but operators can be reached, whatever the text says."""
    if op not in _NODE_KINDS:
        raise ValueError(f"{op!r} is no kind of node that an exported graph has")
    if op == "placeholder":
        return _identifier(text)
    if op != "call_function":
        if not _TARGET.fullmatch(text):
            raise ValueError(f"{text!r} is no tensor name")
        return text
    function = _function(text)
    if function is not None:
        return function
    names = [_identifier(name) for name in text.split(".")]
    if names[0] == "higher_order":
        operator_ = getattr(torch.ops.higher_order, names[1])
        return _checked(operator_, torch._ops.HigherOrderOperator, text)
    namespace = _checked(getattr(torch.ops, names[0]), torch._ops._OpNamespace, text)
    packet = _checked(getattr(namespace, names[1]), torch._ops.OpOverloadPacket, text)
    return _checked(getattr(packet, names[2]), torch._ops.OpOverload, text)


def _identifier(text: str) -> str:
    """A name that may become Python source when the graph is compiled."""
    if not text.isidentifier() or keyword.iskeyword(text):
        raise ValueError(f"{text!r} is no name")
    return text


def _checked(value: Any, kind: type, text: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{text} is no operator")
    return value


def _function(text: str) -> Callable[..., Any] | None:
    """A plain function from the short list that exported graphs use, or None."""
    module, _, name = text.rpartition(".")
    if module in ("_operator", "operator") and name in _OPERATORS:
        return getattr(operator, name, None)
    if module == "math" and name.isalnum():
        return getattr(math, name, None)
    if module == "torch" and name.startswith("sym_"):
        return getattr(torch, name, None)
    return None


def _encode(value: Any, node: fx.Node) -> Any:  # noqa: C901, PLR0911 - a branch a JSON form
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return {"str": value}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(v, node) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, node) for v in value]}
    if isinstance(value, dict):
        return {"dict": {str(k): _encode(v, node) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(v, node) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _TORCH_TYPES.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise UnsupportedError(
        f"an argument of type {type(value).__name__} has no stored form", where=f"node {node.name}"
    )


def _decode(value: Any, seen: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, seen) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    decoders: dict[str, Callable[[Any], Any]] = {
        "float": float,
        "str": str,
        "node": seen.__getitem__,
        "tuple": lambda c: tuple(_decode(v, seen) for v in c),
        "dict": lambda c: {k: _decode(v, seen) for k, v in c.items()},
        "slice": lambda c: slice(*(_decode(v, seen) for v in c)),
        "device": torch.device,
    }
    if kind in decoders:
        return decoders[kind](content)
    decoded = getattr(torch, content)
    if not isinstance(decoded, _TORCH_TYPES[kind]):
        raise TypeError(f"{content!r} is no {kind}")
    return decoded


def _encode_tree(graph: fx.Graph) -> dict[str, Any]:
    specs = {"in": input_spec(graph), "out": output_spec(graph)}
    modules = {m for spec in specs.values() for m in _node_modules(spec)}
    return {
        "arguments": argument_names(graph),
        "modules": sorted(modules),
        **{name: pytree.treespec_dumps(spec) for name, spec in specs.items()},
    }


def _node_modules(spec: pytree.TreeSpec) -> set[str]:
    """Modules that define the container classes of a tree, builtins left out."""
    own = getattr(spec.type, "__module__", "builtins") if spec.type is not None else "builtins"
    found = set() if own in ("builtins", "collections") else {own}
    for child in spec.children():
        found |= _node_modules(child)
    return found


def _decode_tree(tree: Mapping[str, Any]) -> _PyTreeCodeGen:
    """Rebuild the call signature; output classes of trusted libraries are imported first."""
    for name in tree["modules"]:
        if name.split(".")[0] in _TRUSTED_TREES:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UnsupportedError(
                    f"the program returns a class of {name}, which cannot be imported",
                    hint="pip install 'qalora-compile[hf]'",
                ) from error
    try:
        specs = [pytree.treespec_loads(tree[name]) for name in ("in", "out")]
    except NotImplementedError as error:
        raise UserInputError(
            f"the program takes or returns a class that is not registered: {error}",
            hint=f"import {', '.join(tree['modules'])} before loading",
        ) from error
    arguments = [_identifier(name) for name in tree["arguments"]]
    return _PyTreeCodeGen(_PyTreeInfo(arguments, specs[0], specs[1]))

"""A torch.fx graph as JSON and back, without pickle and without tracing again.

`torch.export.save` would trace the rewritten graph again, rename its nodes and store example inputs
as a pickle. This form keeps node names, site marks and the call signature. Reading it runs no code:
operators come from a fixed list (`ir.operators`), containers from a fixed table (`ir.tree_json`),
and arguments are compared with the operators' schemas.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.meta import mark_site, site_of
from qalora_compile.ir.operators import check_call, find_operator, operator_text
from qalora_compile.ir.signature import argument_names, input_spec, output_spec
from qalora_compile.ir.torch_internals import CallTree, call_tree, set_call_tree
from qalora_compile.ir.tree_json import tree_from_text, tree_to_text

_DROPOUT_P = "qalora_dropout_p"
_TORCH_TYPES = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_NODE_KINDS = ("placeholder", "get_attr", "call_function", "output")
_TARGET = re.compile(r"[^\s\"'\\\\()]+")


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
    if call_tree(graph) is not None:
        encoded["tree"] = _encode_tree(graph)
    return encoded


def graph_from_json(value: Mapping[str, Any]) -> tuple[fx.Graph, dict[str, fx.GraphModule]]:
    """Decode a graph; also return its subgraphs by target.

    Raises:
        UserInputError: the JSON is malformed or names an unknown operator.
    """
    graph = fx.Graph()
    seen: dict[str, fx.Node] = {}
    try:
        for row in value["nodes"]:
            args = tuple(_decode(a, seen) for a in row["args"])
            kwargs = {_identifier(k): _decode(v, seen) for k, v in row.get("kwargs", {}).items()}
            node = _create_node(graph, row, args, kwargs)
            if row["name"] in seen:
                raise ValueError(f"two nodes are named {row['name']!r}")
            seen[row["name"]] = node
        if "tree" in value:
            placeholders = sum(node.op == "placeholder" for node in graph.nodes)
            set_call_tree(graph, _decode_tree(value["tree"], placeholders))
        graph.lint()
        subgraphs = {}
        for target, encoded in value["subgraphs"].items():
            inner, nested = graph_from_json(encoded)
            subgraphs[target] = fx.GraphModule(dict(nested), inner)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserInputError(f"the stored graph is malformed: {error!r}") from error
    return graph, subgraphs


def _create_node(
    graph: fx.Graph, row: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    """Add the node of a row, once its arguments have been compared with the operator's schema."""
    target = _decode_target(row["op"], row["target"])
    if row["op"] == "call_function":
        check_call(target, args, kwargs)
    node = graph.create_node(row["op"], target, args, kwargs, name=_text(row["name"]))
    if "site" in row:
        mark_site(node, _text(row["site"]))
    if "dropout_p" in row:
        node.meta[_DROPOUT_P] = _probability(row["dropout_p"])
    return node


def _encode_target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return operator_text(node.target, f"node {node.name}")


def _decode_target(op: str, text: str) -> Any:
    """What a node calls or names. Whatever the text says, only operators can be reached."""
    if op not in _NODE_KINDS:
        raise ValueError(f"{op!r} is not a kind of node that an exported graph has")
    if op == "placeholder":
        return _identifier(text)
    if op == "call_function":
        return find_operator(text)
    if not _TARGET.fullmatch(text):
        raise ValueError(f"{text!r} is not a tensor name")
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a probability")
    return value


def _identifier(text: Any) -> str:
    """A name that may become Python source when the graph is compiled."""
    if not isinstance(text, str) or not text.isidentifier() or keyword.iskeyword(text):
        raise ValueError(f"{text!r} is not a name")
    return text


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
        raise TypeError(f"{content!r} is not a {kind}")
    return decoded


def _encode_tree(graph: fx.Graph) -> dict[str, Any]:
    return {
        "arguments": argument_names(graph),
        "in": tree_to_text(input_spec(graph)),
        "out": tree_to_text(output_spec(graph)),
    }


def _decode_tree(tree: Mapping[str, Any], placeholders: int) -> CallTree:
    """Rebuild the call signature; its names become Python source when the graph is compiled."""
    arguments = [_identifier(name) for name in tree["arguments"]]
    inputs, outputs = (tree_from_text(tree[name]) for name in ("in", "out"))
    if inputs.type is not tuple or [c.type for c in inputs.children()] != [tuple, dict]:
        raise ValueError("the tree of the inputs is not a pair of positional and named arguments")
    positional, named = inputs.children()
    if [_identifier(name) for name in named.context] != arguments[positional.num_children :]:
        raise ValueError("the named arguments of the tree are not those of the graph")
    if inputs.num_leaves != placeholders:
        raise ValueError(f"the tree has {inputs.num_leaves} inputs, the graph {placeholders}")
    return CallTree(arguments, inputs, outputs)

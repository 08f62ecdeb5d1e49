"""Tidying of a translated model: passes in time linear in its size, and readable names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from qalora_compile.exporters.onnx.small_types import use_small_types
from qalora_compile.ir.joined_layers import joined_layers
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Signature
from qalora_compile.ir.site_plan import EMBEDDING, Site
from qalora_compile.ir.stages import PLANE_NAMES
from qalora_compile.optional import require

_ADD = torch.ops.aten.add.Tensor
_ADDED = {_ADD: "other", torch.ops.qalora.matmul_nbits.default: "bias"}
"""The operand of an operator that may be the bias of a layer."""
_SUMS = 3
"""A layer is a sum of at most: a product with its bias, a correction, and a high plane."""
_FOLD_LIMIT_ELEMENTS = 4096  # folding larger constants would duplicate weights


def tidy(model: Any) -> None:
    """Fold small constants, merge equal nodes and remove dead ones, in place."""
    passes = require("onnx_ir.passes.common", extra="onnx", purpose="tidy an ONNX model")
    optimizer = require("onnxscript.optimizer", extra="onnx", purpose="tidy an ONNX model")
    passes.IdentityEliminationPass()(model)  # if folded, a weight would take the name of its copy
    optimizer.fold_constants(
        model,
        input_size_limit=_FOLD_LIMIT_ELEMENTS,
        output_size_limit=_FOLD_LIMIT_ELEMENTS,
    )
    use_small_types(model)  # last, since constants of these types must not be folded
    for step in (
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        step(model)


_AXES = {
    "batch": "batch_size",
    **{name: f"{name}_length" for name in ("sequence", "past_sequence", "total_sequence")},
    "encoder_sequence": "encoder_sequence_length",
    "encoder_past_sequence": "encoder_past_sequence_length",
}
"""Axes of a signature, by their names in files of optimum: transformers.js makes the first cache of
a model by the name `batch_size`."""


def name_axes(model: Any, signature: Signature) -> None:
    """Name dynamic axes after the signature's, `batch_size` and not `s17`: see `_AXES`."""
    ir = require("onnx_ir", extra="onnx", purpose="name the axes of an ONNX model")
    names: dict[str, str] = {}
    leaves = {leaf.name: leaf for leaf in signature.inputs}
    for value in model.graph.inputs:
        leaf = leaves.get(value.name)
        if leaf is None or value.shape is None:
            continue
        for size, name in zip(value.shape, leaf.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and isinstance(name, str) and size.value:
                names[size.value] = _AXES.get(name, name)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    names.get(d.value, d.value) if isinstance(d, ir.SymbolicDim) else d
                    for d in value.shape
                ]
            )


def name_sites(model: Any, program: Program) -> dict[str, str]:
    """Name each site's nodes after its module path; returns site name → value of its output.

    A site is found by the initializer that only it (or a site with the same weight) reads; uses of
    a shared weight are distinguished by graph order, which translation preserves.
    """
    found: dict[str, str] = {}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                readers[value.name] += _products(node)
    biases, joined = _biases(program), joined_layers(program.graph)
    used: dict[str, int] = defaultdict(int)
    for site in program.plan:
        if site.bits is None:
            continue
        bias = biases.get(site.name, frozenset())
        if site.name in joined:
            value = _part(readers[joined[site.name].codes][0], site, joined[site.name].index)
            last = _follow_adds(value, site, bias)
        else:
            nodes = readers.get(weight := _first_weight(site, readers), [])
            if used[weight] >= len(nodes):
                continue
            node = nodes[used[weight]]
            used[weight] += 1
            if site.kind == EMBEDDING:  # its node gathers codes; no single node holds its output
                continue
            node.name = f"{site.name}/{node.op_type}"
            last = _last(node, site, bias)
        if not last.is_graph_output():
            last.name = f"{site.name}/output"
        found[site.name] = last.name
    return found


def _part(node: Any, site: Site, index: int) -> Any:
    """A result of the Split of a layer that computes several; the first of them names both nodes.

    The Split's axis is the last one, and is written as such: a reader need not know the rank.
    """
    ir = require("onnx_ir", extra="onnx", purpose="name the nodes of an ONNX model")
    (split,) = node.outputs[0].consumers()
    split.attributes["axis"] = ir.AttrInt64("axis", -1)
    if index == 0:
        node.name, split.name = f"{site.name}/{node.op_type}", f"{site.name}/Split"
    return split.outputs[index]


def _last(node: Any, site: Site, bias: frozenset[str]) -> Any:
    """The output of a site, from the node of its layer, or of its first expert, on."""
    if site.experts:
        return _follow_concat(node)
    return _follow_adds(node.outputs[0], site, bias)


def _products(node: Any) -> list[Any]:
    """The nodes that multiply by a weight that `node` reads: itself, or its consumers."""
    return list(node.outputs[0].consumers()) if node.op_type == "DequantizeLinear" else [node]


def _biases(program: Program) -> dict[str, frozenset[str]]:
    """Site → names that its bias may have, if a separate node adds it.

    A bias that is stored in half precision is widened first; once folded, it has that node's name.
    """
    found = {}
    for node in program.graph.nodes:
        added = _ADDED.get(node.target)
        name = None if added is None else _site_of_sum(node)
        if name is None or added is None:
            continue
        operand = argument(node, added)
        names = set()
        if isinstance(operand, torch.fx.Node) and operand.target is torch.ops.aten.to.dtype:
            names.add(operand.name)
            operand = argument(operand, "self")
        if isinstance(operand, torch.fx.Node) and operand.op == "get_attr":
            found[name] = frozenset({*names, str(operand.target)})
    return found


def _site_of_sum(node: torch.fx.Node) -> str | None:
    """The site of a layer's product or sum; its mark may be on a sum with another part of it."""
    for _ in range(_SUMS):
        if (name := site_of(node)) is not None:
            return name
        users = [user for user in node.users if user.target is _ADD]
        if not users:
            break
        node = users[0]
    return None


def _follow_concat(node: Any) -> Any:
    """The result of the Concat that joins the experts, from the layer of the first expert on."""
    last = node
    while last.op_type != "Concat" and last.outputs[0].consumers():
        last = last.outputs[0].consumers()[0]
    return last.outputs[0]


def _first_weight(site: Site, readers: Mapping[str, object]) -> str:
    """Name of a site's codes; those of its first expert, or the low plane, if it has any."""
    names = [f"{site.path}.{part}qweight" for part in ("", "0.", f"{PLANE_NAMES[0]}.")]
    return next((name for name in names if name in readers), names[0])


def _follow_adds(value: Any, site: Site, bias: frozenset[str]) -> Any:
    """The site's output: that of the last Add of a correction, a bias or a plane to `value`."""
    for user in value.consumers():
        what = _operand(user, value, site, bias) if user.op_type == "Add" else None
        if what is None:
            continue
        user.name = f"{site.name}/{what}"
        if what == "Add":
            other = next(v for v in user.inputs if v is not value)
            other.producer().name = f"{site.name}/Correction"
        return _follow_adds(user.outputs[0], site, bias)
    return value


def _operand(add: Any, value: Any, site: Site, bias: frozenset[str]) -> str | None:
    """The name of an Add to `value`, if it belongs to the site.

    It is `Add` (the correction), `Bias`, or `Planes` (the high plane).
    """
    other = next((v for v in add.inputs if v is not value), None)
    if other is None:
        return None
    producer = other.producer()
    stored = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else other
    if stored.is_initializer():
        return "Bias" if stored.name in bias else None
    low, high = (f"{site.path}.{plane}" for plane in PLANE_NAMES)
    if producer is not None and producer.op_type == "Mul":
        return "Planes" if _multiplies(producer.inputs[0], f"{high}.qweight") else None
    if producer is None or producer.op_type != "MatMul":
        return None
    corrections = (f"{site.path}.correction", f"{low}.correction")
    return "Add" if any(_reads(producer, name) for name in corrections) else None


def _multiplies(value: Any, weight: str) -> bool:
    """Whether a value is the product with a weight, with or without its correction."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Add":
        return any(_multiplies(operand, weight) for operand in producer.inputs)
    return producer is not None and _reads(producer, weight)


def _reads(node: Any, name: str) -> bool:
    """Whether a node reads an initializer, directly or dequantized."""
    given = [value for value in node.inputs if value is not None]
    sources = [value.producer() for value in given]
    given += [s.inputs[0] for s in sources if s is not None and s.op_type == "DequantizeLinear"]
    return any(value.name == name for value in given)

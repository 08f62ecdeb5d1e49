"""Operators of mutation: faults of an exported transformer, generated node by node.

Each yields copies of a model with one change in attention, masks, rotary tables, caches, norms,
residuals, heads or gates. `rewrites` yields changes that keep the meaning.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Mutant = tuple[str, Any]
_REPLACED = {
    "LessOrEqual": ("Less", "GreaterOrEqual"),
    "And": ("Or",),
    "Cos": ("Sin",),
    "Sin": ("Cos",),
    "Sigmoid": ("Tanh",),
    "Add": ("Sub", "Mul"),
    "Sub": ("Add",),
    "Mul": ("Add",),
}
_ATTRIBUTES: dict[str, dict[str, tuple[Any, ...]]] = {
    "Attention": {"scale": (0.5, 0.2500001), "softcap": (30.0,), "is_causal": (1,)},
    "CachedAttention": {"scale": (0.5, 0.2500001)},
    "RotaryEmbedding": {"interleaved": (1,), "rotary_embedding_dim": (8,)},
    "RMSNormalization": {"epsilon": (1e-5, 1.1e-6)},
}
_SWAPPED = ("Attention", "CachedAttention", "RotaryEmbedding", "Sub", "LessOrEqual", "Gather")
_BYPASSED = ("RotaryEmbedding", "And", "RMSNormalization", "Cos", "Sin", "Cast", "Sigmoid", "Neg")
_HUGE = 1 << 31
_SMALL = 64


def mutants(model: Any) -> Iterator[Mutant]:
    """All faults of a model."""
    for make in (_operators, _attributes, _operands, _bypasses, _constants, _readers, _insertions):
        yield from make(model)


def _changed(model: Any) -> Any:
    return copy.deepcopy(model)


def _quantized(node: Any) -> bool:
    """Whether a node belongs to a quantized layer, which other faults are for."""
    names = " ".join([*node.input, *node.output])
    return any(word in names for word in ("qweight", "correction", "group_sum", "_blocks"))


def _places(model: Any) -> list[tuple[int, Any]]:
    return [(i, n) for i, n in enumerate(model.graph.node) if not _quantized(n)]


def _zeros(model: Any) -> set[str]:
    """The names of integer constants that are 0."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    return {
        name
        for name, t in constants.items()
        if t.data_type == onnx.TensorProto.INT64 and not numpy_helper.to_array(t).any()
    }


def _operators(model: Any) -> Iterator[Mutant]:
    zeros = _zeros(model)
    for place, node in _places(model):
        if node.op_type == "Add" and zeros & set(node.input):
            continue  # x - 0 is x + 0
        for other in _REPLACED.get(node.op_type, ()):
            made = _changed(model)
            made.graph.node[place].op_type = other
            yield f"{node.op_type} {node.output[0]} is {other}", made


def _attributes(model: Any) -> Iterator[Mutant]:
    for place, node in _places(model):
        for name, values in _ATTRIBUTES.get(node.op_type, {}).items():
            for value in values:
                made = _changed(model)
                there = made.graph.node[place].attribute
                for old in [a for a in there if a.name == name]:
                    there.remove(old)
                there.append(helper.make_attribute(name, value))
                yield f"{name} of {node.op_type} {node.output[0]} is {value}", made


def _operands(model: Any) -> Iterator[Mutant]:
    for place, node in _places(model):
        if node.op_type not in _SWAPPED:
            continue
        for first in range(len(node.input) - 1):
            made = _changed(model)
            read = made.graph.node[place].input
            read[first], read[first + 1] = read[first + 1], read[first]
            yield f"operands {first} and {first + 1} of {node.output[0]} are exchanged", made


def _bypasses(model: Any) -> Iterator[Mutant]:
    for place, node in _places(model):
        if node.op_type in _BYPASSED:
            made = _changed(model)
            there = made.graph.node[place]
            kept = there.input[0]
            there.op_type, there.domain = "Identity", ""
            del there.input[:], there.attribute[:]
            there.input.append(kept)
            yield f"{node.op_type} {node.output[0]} is left out", made


def _constants(model: Any) -> Iterator[Mutant]:
    read = {name for _, node in _places(model) for name in node.input}
    for place, proto in enumerate(model.graph.initializer):
        values = numpy_helper.to_array(proto)
        if proto.name not in read or values.size > _SMALL or "weight" in proto.name:
            continue
        if values.size and values.dtype.kind == "i" and np.abs(values).max() >= _HUGE:
            continue
        if _only_axes(model, proto.name):
            continue  # of slices that take everything, which are the same along any axis
        made = _changed(model)
        other = values.copy()
        if other.dtype == bool:
            other[...] = ~other
        elif other.dtype.kind == "f":
            other.reshape(-1)[-1:] *= 1 + 1e-6
        else:
            other.reshape(-1)[:1] += 1
        made.graph.initializer[place].CopyFrom(numpy_helper.from_array(other, proto.name))
        yield f"the constant {proto.name} is another", made


def _only_axes(model: Any, name: str) -> bool:
    """Whether a constant is read as the axis of complete slices alone."""
    huge = {
        t.name
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.INT64 and (numpy_helper.to_array(t) >= _HUGE).any()
    }
    readers = [node for node in model.graph.node if name in node.input]
    return all(
        node.op_type == "Slice" and node.input[2] in huge and list(node.input).index(name) == 3
        for node in readers
    )


def _readers(model: Any) -> Iterator[Mutant]:
    """Nodes that read the value of another layer, or an earlier or later residual."""
    pasts = [i.name for i in model.graph.input if i.name.startswith("past_key_values.")]
    for one, other in zip(pasts, [*pasts[1:], pasts[0]], strict=True):
        yield f"{one} is read in place of {other}", _reread(model, other, one)
    adds = [n.output[0] for _, n in _places(model) if n.op_type == "Add" and "add_" in n.output[0]]
    for one, other in itertools.pairwise(adds):
        yield f"residual {one} is read in place of {other}", _reread(model, other, one)
    norms = [n.output[0] for _, n in _places(model) if n.op_type == "RMSNormalization"]
    for one, other in itertools.pairwise(norms):
        yield f"norm {one} is read in place of {other}", _reread(model, other, one)


def _reread(model: Any, old: str, new: str) -> Any:
    made = _changed(model)
    for node in made.graph.node:
        if new in node.output:
            continue
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
    return made


def _insertions(model: Any) -> Iterator[Mutant]:
    """Nodes behind a value: the six that a sampled proof once called equal are of this kind."""
    for place, node in _places(model):
        if node.op_type in ("Attention", "CachedAttention", "RotaryEmbedding", "Sigmoid"):
            for op in ("Neg", "Tanh") if node.op_type == "Sigmoid" else ("Neg", "Tanh", "Relu"):
                yield f"{op} behind {node.output[0]}", _behind(model, place, op)
    last = len(model.graph.node) - 1
    yield "a softcap of 1000 on the logits", _softcap(model, last)
    yield "logits doubled from position 40 on", _far(model, last)


def _behind(model: Any, place: int, op: str) -> Any:
    made = _changed(model)
    name = made.graph.node[place].output[0]
    made.graph.node[place].output[0] = "planted"
    made.graph.node.insert(place + 1, helper.make_node(op, ["planted"], [name]))
    return made


def _softcap(model: Any, place: int) -> Any:
    made = _changed(model)
    name = made.graph.node[place].output[0]
    made.graph.node[place].output[0] = "planted"
    made.graph.initializer.append(numpy_helper.from_array(np.float32(1000), "cap"))
    for op, read, given in (
        ("Div", ["planted", "cap"], "planted1"),
        ("Tanh", ["planted1"], "planted2"),
        ("Mul", ["planted2", "cap"], name),
    ):
        made.graph.node.append(helper.make_node(op, read, [given]))
    return made


def _far(model: Any, place: int) -> Any:
    made = _changed(model)
    name = made.graph.node[place].output[0]
    made.graph.node[place].output[0] = "planted"
    for key, value in (("forty", np.int64(40)), ("one", np.float32(1)), ("two", np.float32(2))):
        made.graph.initializer.append(numpy_helper.from_array(value, key))
    made.graph.initializer.append(numpy_helper.from_array(np.array([2]), "axis"))
    for op, read, given in (
        ("Less", ["position_ids", "forty"], "near"),
        ("Where", ["near", "one", "two"], "factor"),
        ("Unsqueeze", ["factor", "axis"], "factors"),
        ("Mul", ["planted", "factors"], name),
    ):
        made.graph.node.append(helper.make_node(op, read, [given]))
    return made


def one_row_of_the_table(model: Any) -> Any:
    """One token has another embedding."""
    made = _changed(model)
    proto = next(t for t in made.graph.initializer if t.name == "lm_head.weight")
    values = numpy_helper.to_array(proto).copy()
    values[7] *= -1
    proto.CopyFrom(numpy_helper.from_array(values, proto.name))
    return made


def rewrites(model: Any) -> Iterator[Mutant]:
    """Changes that keep the meaning."""
    for place, node in _places(model):
        if node.op_type in ("Add", "Mul", "And"):
            made = _changed(model)
            read = made.graph.node[place].input
            read[0], read[1] = read[1], read[0]
            yield f"the operands of {node.output[0]} are exchanged", made
        if node.op_type in ("Attention", "CachedAttention", "RotaryEmbedding"):
            yield f"Identity behind {node.output[0]}", _behind(model, place, "Identity")
        if node.op_type == "LessOrEqual":
            made = _changed(model)
            there = made.graph.node[place]
            there.op_type = "GreaterOrEqual"
            there.input[0], there.input[1] = there.input[1], there.input[0]
            yield f"{node.output[0]} is written as ≥", made
        if node.op_type in ("Cos", "Sin"):
            yield f"{node.output[0]} through a double transposition", _transposed(model, place)


def _transposed(model: Any, place: int) -> Any:
    made = _changed(model)
    name = made.graph.node[place].output[0]
    made.graph.node[place].output[0] = "planted"
    for offset, (read, given) in enumerate((("planted", "planted1"), ("planted1", name))):
        node = helper.make_node("Transpose", [read], [given], perm=[0, 2, 1])
        made.graph.node.insert(place + 1 + offset, node)
    return made


def save(model: Any, path: Any) -> Any:
    """Write a model; returns its path."""
    onnx.save(model, path)
    return path

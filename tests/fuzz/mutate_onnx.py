"""Mutations of ONNX models, by onnx's own objects."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.json_texts import TEXTS, changed_json

Draw = Callable[[Any], Any]
SIZES = (0, -1, 1, 2, 3, 7, 64, 2**31 - 1, 2**62, -(2**63))
TYPES = (0, 1, 2, 3, 6, 7, 8, 10, 16, 17, 21, 23, 99)
OPERATORS = ("Add", "Loop", "If", "Scan", "Cast", "Nothing", "EPContext")
PLACES = ("../x", "/etc/hostname", "a/../../x", "", "model.onnx", "model.onnx.data", "no", "\0")
NUMBERS = ("0", "1", "-1", "4096", str(2**62), str(2**64), "x", "0x10", "\uff11")
Change = tuple[str, bool]
"""What was changed, and whether the model still is a valid one that says something else."""


def mutate_onnx(draw: Draw, path: Path) -> tuple[str, str, bool]:
    """Change one message of a model."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    kind = draw(st.sampled_from(sorted(_WAYS)))
    detail, content = _WAYS[kind](draw, model)
    path.write_bytes(model.SerializeToString())
    return kind, detail, content


def _node(draw: Draw, model: Any) -> Any:
    return draw(st.sampled_from(list(model.graph.node)))


def _tensor(draw: Draw, model: Any) -> Any:
    return draw(st.sampled_from(list(model.graph.initializer)))


def _attribute(draw: Draw, model: Any) -> Change:
    node = draw(st.sampled_from([n for n in model.graph.node if n.attribute]))
    chosen = draw(st.sampled_from(list(node.attribute)))
    if chosen.ints:
        chosen.ints[0] = draw(st.sampled_from(SIZES))
    else:
        chosen.i = draw(st.sampled_from(SIZES))
    return f"{node.op_type}.{chosen.name}", True


def _dims(draw: Draw, model: Any) -> Change:
    tensor = _tensor(draw, model)
    detail, size = f"{tensor.name} {list(tensor.dims)}", math.prod(tensor.dims)
    if tensor.dims and draw(st.booleans()):
        tensor.dims[0] = draw(st.sampled_from(SIZES))
    else:
        tensor.dims.append(draw(st.sampled_from(SIZES)))
    return detail, math.prod(tensor.dims) == size


def _type(draw: Draw, model: Any) -> Change:
    tensor = _tensor(draw, model)
    tensor.data_type = draw(st.sampled_from(TYPES))
    return str(tensor.name), True


def _wire(draw: Draw, model: Any) -> Change:
    names = [name for each in model.graph.node for name in (*each.input, *each.output)]
    node = _node(draw, model)
    values = node.input if draw(st.booleans()) and node.input else node.output
    values[draw(st.integers(0, len(values) - 1))] = draw(st.sampled_from((*names, "", "no")))
    return f"{node.op_type} {node.name}", True


def _operator(draw: Draw, model: Any) -> Change:
    node = _node(draw, model)
    node.op_type = draw(st.sampled_from(OPERATORS))
    return str(node.name), True


def _external(draw: Draw, model: Any) -> Change:
    """Another place of a tensor's bytes."""
    tensor = _tensor(draw, model)
    key = draw(st.sampled_from(("location", "offset", "length", "basepath", "location")))
    value = draw(st.sampled_from(PLACES if key == "location" else NUMBERS))
    found = [entry for entry in tensor.external_data if entry.key == key]
    entry = found[0] if found and draw(st.booleans()) else tensor.external_data.add(key=key)
    entry.value = value
    tensor.data_location = 1
    # another place with as many bytes is a place; any other has to be noticed
    return (
        f"{tensor.name}: {key} {value!r}",
        key == "offset" and value.isascii() and value.isdigit(),
    )


def _metadata(draw: Draw, model: Any) -> Change:
    entry = draw(st.sampled_from(list(model.metadata_props)))
    try:
        entry.value, detail, content = changed_json(draw, entry.value)
    except ValueError:  # no JSON, or half of a surrogate pair, which protobuf does not take
        entry.value = draw(st.sampled_from(TEXTS))
        return str(entry.key), True
    return detail, content


def _drop(draw: Draw, model: Any) -> Change:
    at = draw(st.integers(0, len(model.graph.node) - 1))
    del model.graph.node[at]
    return f"node {at}", True


def _double(draw: Draw, model: Any) -> Change:
    node = _node(draw, model)
    model.graph.node.append(node)
    return str(node.name), False


def _function(draw: Draw, model: Any) -> Change:
    chosen = draw(st.sampled_from(list(model.functions)))
    inner = draw(st.sampled_from(list(chosen.node)))
    inner.op_type, inner.domain = chosen.name, chosen.domain
    return f"{chosen.name} calls itself", False


def _raw(draw: Draw, model: Any) -> Change:
    tensor = _tensor(draw, model)
    size = len(tensor.raw_data)
    tensor.raw_data = draw(st.binary(max_size=16))
    return str(tensor.name), len(tensor.raw_data) == size


def _leaf(draw: Draw, model: Any) -> Change:
    leaf = draw(st.sampled_from([*model.graph.input, *model.graph.output]))
    leaf.type.tensor_type.elem_type = draw(st.sampled_from((0, 1, 7, 8, 10, 99)))
    return str(leaf.name), True


def _opset(draw: Draw, model: Any) -> Change:
    chosen = draw(st.sampled_from(list(model.opset_import)))
    chosen.version = draw(st.sampled_from((0, 1, 5, 99)))
    return str(chosen.domain), True


_WAYS: dict[str, Callable[[Draw, Any], Change]] = {
    "attribute": _attribute,
    "dims": _dims,
    "type": _type,
    "wire": _wire,
    "operator": _operator,
    "external": _external,
    "metadata": _metadata,
    "drop": _drop,
    "double": _double,
    "function": _function,
    "raw": _raw,
    "leaf": _leaf,
    "opset": _opset,
}

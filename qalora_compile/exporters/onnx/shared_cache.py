"""`share_cache`: let a caller keep keys and values in buffers that have room for more."""

from __future__ import annotations

from typing import Any

from qalora_compile.exporters.onnx.attention_function import CACHED_ATTENTION
from qalora_compile.exporters.onnx.functions import QALORA
from qalora_compile.optional import require
from qalora_compile.untrusted.artifacts import SHARED_CACHE_KEY

_TOKENS, _MASK, _PAST = "input_ids", "attention_mask", "past_key_values."
_LENGTH = 2
"""The axis of tokens of a cache `[B, H, P, D]`."""


def share_cache(model: Any) -> None:
    """Take the length of the past from the attention mask, so that past tensors may be longer.

    A caller may then give CachedAttention one buffer as past and as present. The model says so in
    its metadata. Models in which something else reads the past, or without such a mask, stay as
    they are.
    """
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    inputs = {value.name: value for value in model.graph.inputs}
    past = [value for name, value in inputs.items() if name.startswith(_PAST)]
    given = [inputs.get(name) for name in (_MASK, _TOKENS)]
    readers = [node for value in past for node in value.consumers()]
    if not past or any(v is None or v.shape is None or len(v.shape) != 2 for v in given):
        return
    sizes_read = {node: _axes(node) for node in readers if not _is_attention(node)}
    if any(axes is None for axes in sizes_read.values()):
        return
    lengths = [node for node, axes in sizes_read.items() if axes == [_LENGTH]]
    sizes = [
        ir.node("Shape", [value], attributes={"start": 1, "end": 2}, num_outputs=1)
        for value in given
    ]
    difference = ir.node("Sub", [size.outputs[0] for size in sizes])
    model.graph.insert_before(model.graph[0], [*sizes, difference])
    for node in lengths:
        ir.convenience.replace_all_uses_with(node.outputs[0], difference.outputs[0])
    model.metadata_props[SHARED_CACHE_KEY] = "1"


def _is_attention(node: Any) -> bool:
    return (node.domain, node.op_type) == (QALORA, CACHED_ATTENTION)


def _axes(node: Any) -> list[int] | None:
    """The axes whose sizes a node takes; None if it reads anything but the length or the others."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    if node.op_type != "Shape" or end is None:
        return None
    axes = list(range(start.value if start else 0, end.value))
    return axes if axes == [_LENGTH] or _LENGTH not in axes else None

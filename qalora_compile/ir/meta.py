"""Typed access to the node metadata that this package writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

ONNX_METADATA_KEY = "qalora"
"""Key of an exported model's metadata under which signature, sites and history are stored."""

QDQ_ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"
"""Session configuration entry that must be 0, or ONNX Runtime fuses DequantizeLinear and MatMul
into a MatMulNBits on int8 activations."""

OPENVINO_SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
"""Properties with which OpenVINO computes in float32 throughout. Its defaults are bfloat16 where
the processor has it, and a cache of 8 bits."""

PAST = "past_key_values."
"""Prefix of the names of inputs that hold past keys and values."""

_SITE = "qalora_site"
_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "val")


def site_of(node: fx.Node) -> str | None:
    """Name of the site whose output this node computes, or None."""
    name = node.meta.get(_SITE)
    return name if isinstance(name, str) else None


def mark_site(node: fx.Node, name: str) -> None:
    """Mark `node` as the one that computes the output of the site `name`."""
    node.meta[_SITE] = name


def move_site(source: fx.Node, target: fx.Node) -> None:
    """Move the site mark, shape and provenance of `source` to the node that replaces it."""
    for key in _KEPT:
        if key in source.meta:
            target.meta[key] = source.meta[key]
    name = source.meta.pop(_SITE, None)
    if name is not None:
        target.meta[_SITE] = name


def module_path(node: fx.Node) -> str | None:
    """Module path that called this node in the user's model, from `torch.export`'s own record."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    return str(path) if path else None


def shape_of(node: fx.Node) -> tuple[int | str, ...] | None:
    """Shape recorded at capture, symbols as text; None where it was not recorded."""
    from torch import Tensor

    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(d if isinstance(d, int) else str(d) for d in value.shape)

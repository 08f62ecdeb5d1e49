"""The operands and options of an operator that its semantics accounts for.

A node with any others is opaque, because its semantics would ignore them.
"""

from __future__ import annotations

from qalora_compile.verify.proof.graphs.graph import Node

_LAYOUT = ("dtype", "layout", "device", "pin_memory", "non_blocking", "copy", "memory_format")
_DROPOUTS = ("dropout", "dropout_", "feature_dropout", "alpha_dropout")
_TWO = (
    *("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Scalar", "aten.mm.default"),
    *("aten.matmul.default", "aten.type_as.default", "aten.pow.Tensor_Scalar"),
    *("onnx.Add", "onnx.Sub", "onnx.Mul", "onnx.Div", "onnx.Pow", "onnx.MatMul"),
)
_SUMS = ("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
_KNOWN: dict[str, tuple[int, tuple[str, ...]]] = {
    **dict.fromkeys(_TWO, (2, ())),
    # ATen: how many operands, and which keyword arguments
    **dict.fromkeys(("aten.contiguous.default", "aten.clone.default"), (1, ("memory_format",))),
    **{f"aten.{name}.default": (3, ()) for name in _DROPOUTS},
    **dict.fromkeys(_SUMS, (2, ("alpha",))),
    "aten.div.Tensor": (2, ("rounding_mode",)),
    "aten.to.dtype": (5, _LAYOUT),
    "aten.to.device": (6, _LAYOUT),
    "aten.to.dtype_layout": (1, _LAYOUT),
    "aten.transpose.int": (3, ()),
    "aten.rms_norm.default": (4, ("weight", "eps")),
    "qalora.rms_norm.default": (3, ()),
    "aten.gelu.default": (1, ("approximate",)),
    "aten.mean.dim": (3, ("keepdim", "dtype")),
    "aten.layer_norm.default": (6, ("weight", "bias", "eps", "cudnn_enable")),
    "aten.batch_norm.default": (9, ()),
    "aten.softmax.int": (3, ("dim", "dtype")),
    # The other operands concern gradients only.
    "aten.embedding.default": (5, ("padding_idx", "scale_grad_by_freq", "sparse")),
    "aten.linear.default": (3, ("bias",)),
    "aten.addmm.default": (3, ()),
    "aten.slice.Tensor": (5, ("dim", "start", "end", "step")),
    # ONNX: how many operands, and which attributes
    "onnx.Dropout": (3, ("seed",)),
    "onnx.Gelu": (1, ("approximate",)),
    "onnx.ReduceMean": (2, ("axes", "keepdims", "noop_with_empty_axes")),
    "onnx.LayerNormalization": (3, ("axis", "epsilon", "stash_type")),
    "onnx.RMSNormalization": (2, ("axis", "epsilon", "stash_type")),
    "onnx.BatchNormalization": (5, ("epsilon", "momentum", "training_mode")),
    "onnx.Softmax": (1, ("axis",)),
    "onnx.Gather": (2, ("axis",)),
    "onnx.Gemm": (3, ("alpha", "beta", "transA", "transB")),
    "onnx.Transpose": (1, ("perm",)),
    "onnx.Cast": (1, ("to", "saturate")),  # saturate is for the types of eight bits
    "onnx.Slice": (5, ()),
}
_ONE = (1, ())
"""Operators that are not listed have one operand."""


def accounted(node: Node) -> bool:
    """Whether the semantics of a node's operator accounts for all of its operands and options."""
    count, names = _KNOWN.get(node.op, _ONE)
    return len(node.args) <= count and set(node.options) <= set(names)

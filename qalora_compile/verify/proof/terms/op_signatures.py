"""Which operands and options of an operator its meaning as a term accounts for.

A node that has any other is foreign: what a meaning does not know it cannot call equal.
"""

from __future__ import annotations

from qalora_compile.verify.proof.graphs.graph import Node

_LAYOUT = ("dtype", "layout", "device", "pin_memory", "non_blocking", "copy", "memory_format")
_KNOWN: dict[str, tuple[int, tuple[str, ...]]] = {
    # ATen: how many operands, and which keyword arguments
    "aten.contiguous.default": (1, ("memory_format",)),
    "aten.clone.default": (1, ("memory_format",)),
    "aten.dropout.default": (3, ()),
    "aten.dropout_.default": (3, ()),
    "aten.feature_dropout.default": (3, ()),
    "aten.alpha_dropout.default": (3, ()),
    "aten.add.Tensor": (2, ("alpha",)),
    "aten.add.Scalar": (2, ("alpha",)),
    "aten.sub.Tensor": (2, ("alpha",)),
    "aten.sub.Scalar": (2, ("alpha",)),
    "aten.mul.Tensor": (2, ()),
    "aten.mul.Scalar": (2, ()),
    "aten.div.Tensor": (2, ("rounding_mode",)),
    "aten.div.Scalar": (2, ()),
    "aten.to.dtype": (5, _LAYOUT),
    "aten.to.device": (6, _LAYOUT),
    "aten.to.dtype_layout": (1, _LAYOUT),
    "aten.mm.default": (2, ()),
    "aten.matmul.default": (2, ()),
    "aten.transpose.int": (3, ()),
    "aten.rms_norm.default": (4, ("weight", "eps")),
    "qalora.rms_norm.default": (3, ()),
    "aten.type_as.default": (2, ()),
    "aten.pow.Tensor_Scalar": (2, ()),
    "aten.gelu.default": (1, ("approximate",)),
    "aten.mean.dim": (3, ("keepdim", "dtype")),
    "aten.layer_norm.default": (6, ("weight", "bias", "eps", "cudnn_enable")),
    "aten.batch_norm.default": (9, ()),
    "aten.softmax.int": (3, ("dim", "dtype")),
    # The others say which gradient a row has.
    "aten.embedding.default": (5, ("padding_idx", "scale_grad_by_freq", "sparse")),
    "aten.linear.default": (3, ("bias",)),
    "aten.addmm.default": (3, ()),
    "aten.slice.Tensor": (5, ("dim", "start", "end", "step")),
    # ONNX: how many operands, and which attributes
    "onnx.Dropout": (3, ("seed",)),
    "onnx.Add": (2, ()),
    "onnx.Sub": (2, ()),
    "onnx.Mul": (2, ()),
    "onnx.Div": (2, ()),
    "onnx.Pow": (2, ()),
    "onnx.Gelu": (1, ("approximate",)),
    "onnx.ReduceMean": (2, ("axes", "keepdims", "noop_with_empty_axes")),
    "onnx.LayerNormalization": (3, ("axis", "epsilon", "stash_type")),
    "onnx.RMSNormalization": (2, ("axis", "epsilon", "stash_type")),
    "onnx.BatchNormalization": (5, ("epsilon", "momentum", "training_mode")),
    "onnx.Softmax": (1, ("axis",)),
    "onnx.Gather": (2, ("axis",)),
    "onnx.MatMul": (2, ()),
    "onnx.Gemm": (3, ("alpha", "beta", "transA", "transB")),
    "onnx.Transpose": (1, ("perm",)),
    "onnx.Cast": (1, ("to", "saturate")),  # saturate is for the types of eight bits
    "onnx.Slice": (5, ()),
}
_ONE = (1, ())
"""What is not here has one operand."""


def accounted(node: Node) -> bool:
    """Whether the meaning of a node's operator reads all that the node says."""
    count, names = _KNOWN.get(node.op, _ONE)
    return len(node.args) <= count and set(node.options) <= set(names)

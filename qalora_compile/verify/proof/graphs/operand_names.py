"""What operands are called in the definitions of operators, as far as a proof reads them by name.

A proof runs without torch and reads files of both kinds, so the names stand here: those of torch's
schemas, and those of the ONNX specification (and of ONNX Runtime's for its contrib operators).
"""

from __future__ import annotations

_BATCH_NORM = "input weight bias running_mean running_var training momentum eps cudnn_enabled"
_CODES = "bits group_size"
_NAMES = {
    "_operator.getitem": "a b",
    "aten.addmm.default": "self mat1 mat2",
    "aten.alpha_dropout.default": "input p train",
    "aten.batch_norm.default": _BATCH_NORM,
    "aten.cat.default": "tensors dim",
    "aten.constant_pad_nd.default": "self pad value",
    "aten.dropout.default": "input p train",
    "aten.dropout_.default": "self p train",
    "aten.embedding.default": "weight indices",
    "aten.feature_dropout.default": "input p train",
    "aten.instance_norm.default": "input weight bias running_mean running_var use_input_stats",
    "aten.layer_norm.default": "input normalized_shape weight bias eps",
    "aten.linear.default": "input weight bias",
    "aten.matmul.default": "self other",
    "aten.mean.dim": "self dim keepdim",
    "aten.pow.Tensor_Scalar": "self exponent",
    "aten.rms_norm.default": "input normalized_shape weight eps",
    "aten.rrelu.default": "self lower upper training",
    "aten.scaled_dot_product_attention.default": "query key value attn_mask dropout_p",
    "aten.slice.Tensor": "self dim start end step",
    "aten.softmax.int": "self dim dtype",
    "aten.split_with_sizes.default": "self split_sizes dim",
    "aten.t.default": "self",
    "aten.to.device": "self device dtype",
    "aten.to.dtype": "self dtype",
    "aten.transpose.int": "self dim0 dim1",
    "aten.type_as.default": "self other",
    "qalora.affine_linear.default": (
        f"x qweight scale offset bias {_CODES} lora_A lora_B gain shift pool scaling"
    ),
    "qalora.expert_adapter.default": "pooled lora_A lora_B group_offsets scaling",
    "qalora.expert_linear.default": f"x qweight scale offset group_offsets {_CODES}",
    "qalora.group_embedding.default": f"ids qweight scale offset dtype {_CODES} k",
    "qalora.group_linear.default": f"x qweight scale offset bias {_CODES}",
    "qalora.group_sum.default": "x group_size",
    "qalora.pad_groups.default": "x group_size width",
    "qalora.pooled_adapter.default": "pooled lora_A lora_B scaling",
    "qalora.rms_norm.default": "x weight eps",
    "com.microsoft.MatMulNBits": "A B scales zero_points g_idx bias",
    "onnx.BitShift": "X Y",
    "onnx.BitwiseAnd": "A B",
    "onnx.Cast": "input",
    "onnx.DequantizeLinear": "x x_scale x_zero_point",
    "onnx.Dropout": "data ratio training_mode",
    "onnx.Gather": "data indices",
    "onnx.Gemm": "A B C",
    "onnx.LayerNormalization": "X Scale B",
    "onnx.Pad": "data pads constant_value axes",
    "onnx.Pow": "X Y",
    "onnx.RMSNormalization": "X scale",
    "onnx.ReduceMean": "data axes",
    "onnx.ReduceSum": "data axes",
    "onnx.Reshape": "data shape",
    "onnx.Slice": "data starts ends axes steps",
    "onnx.Split": "input split",
    "onnx.Sub": "A B",
    "onnx.Transpose": "data",
    "onnx.Unsqueeze": "data axes",
    "qalora.GroupQuantLinear": "x codes scale zero_point",
}
OPERANDS = {op: tuple(names.split()) for op, names in _NAMES.items()}
"""Operator → the names of its operands, in order; of those behind the last that is read, none."""

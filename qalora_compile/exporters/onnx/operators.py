"""Callables for onnxscript, for operators that onnx has no schema for."""

from __future__ import annotations

from typing import Any

from qalora_compile.exporters.onnx.attention_function import CACHED_ATTENTION
from qalora_compile.exporters.onnx.functions import (
    MICROSOFT,
    QALORA,
    VERSION,
)
from qalora_compile.optional import require

DEQUANTIZE_BLOCKS = "DequantizeBlocks"
"""Stand-in for DequantizeLinear until `small_types` gives its tensors their types."""
UNPACK_BLOCKS = "UnpackBlocks"
"""Stand-in for Cast to uint8 until then."""

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
_BYTES = ("tensor(uint8)",)


def matmul_nbits_op() -> Any:
    """`com.microsoft::MatMulNBits`."""
    return _operator(
        (MICROSOFT, 1, "MatMulNBits"),
        {"A": "T1", "B": "T2", "scales": "T1", "zero_points": "T3"},
        {"K": int, "N": int, "bits": int, "block_size": int, "accuracy_level": int},
        {"T1": _FLOATS, "T2": _BYTES, "T3": (*_BYTES, *_FLOATS), "T4": ("tensor(int32)",)},
        optional={"g_idx": "T4", "bias": "T1"},
    )


def group_quant_linear_op() -> Any:
    """`qalora::GroupQuantLinear` (docs/reference/operators.md), with its function's attributes."""
    sizes = ("K", "N", "bits", "group_size")
    stock = ("stock_bits", "stock_block_size", "stock_accuracy_level")
    return _operator(
        (QALORA, VERSION, "GroupQuantLinear"),
        {"x": "T1", "codes": "T2", "scale": "T3", "zero_point": "T3"},
        {
            **dict.fromkeys(sizes, int),
            "compute": str,
            **dict.fromkeys(stock, int),
            "stock_middle": float,
            "stock_groups": list,
        },
        {"T1": _FLOATS[:2], "T2": _BYTES, "T3": _FLOATS[:2]},
    )


def cached_attention_op() -> Any:
    """`qalora::CachedAttention`, see docs/reference/operators.md: result, all keys, all values."""
    return _operator(
        (QALORA, VERSION, CACHED_ATTENTION),
        {
            "q": "T1",
            "k": "T1",
            "v": "T1",
            "mask": "T2",
            "past_key": "T1",
            "past_value": "T1",
        },
        {"q_num_heads": int, "kv_num_heads": int, "scale": float},
        {"T1": _FLOATS[:1], "T2": ("tensor(bool)", *_FLOATS[:1])},
        results=3,
    )


def skip_norm_op() -> Any:
    """`com.microsoft::SkipSimplifiedLayerNormalization`: norm, two unused outputs, sum."""
    return _operator(
        (MICROSOFT, 1, "SkipSimplifiedLayerNormalization"),
        {"input": "T1", "skip": "T1", "gamma": "T1"},
        {"epsilon": float},
        {"T1": _FLOATS},
        results=4,
    )


def rotary_op() -> Any:
    """`com.microsoft::RotaryEmbedding`."""
    return _operator(
        (MICROSOFT, 1, "RotaryEmbedding"),
        {"input": "T1", "position_ids": "T2", "cos_cache": "T1", "sin_cache": "T1"},
        {"num_heads": int, "rotary_embedding_dim": int},
        {"T1": _FLOATS, "T2": ("tensor(int64)",)},
    )


def multi_head_op(results: int) -> Any:
    """`com.microsoft::MultiHeadAttention`, with one result, or also with all keys and values."""
    return _operator(
        (MICROSOFT, 1, "MultiHeadAttention"),
        {"query": "T1", "key": "T1", "value": "T1"},
        {"num_heads": int, "scale": float},
        {"T1": _FLOATS, "T2": ("tensor(int32)",)},
        optional={
            "bias": "T1",
            "key_padding_mask": "T2",
            "attention_bias": "T1",
            "past_key": "T1",
            "past_value": "T1",
        },
        results=results,
    )


def dequantize_blocks_op() -> Any:
    """The stand-in for blocked DequantizeLinear; no exported model holds it."""
    return _operator(
        (QALORA, VERSION, DEQUANTIZE_BLOCKS),
        {"codes": "T1", "scale": "T2", "zero_point": "T1"},
        {"K": int, "N": int, "bits": int, "block_size": int},
        {"T1": _BYTES, "T2": _FLOATS},
        result="T2",
    )


def unpack_blocks_op() -> Any:
    """The stand-in for a cast of small integers to uint8; no exported model holds it."""
    return _operator(
        (QALORA, VERSION, UNPACK_BLOCKS),
        {"codes": "T1"},
        {"K": int, "N": int, "bits": int},
        {"T1": _BYTES},
    )


def _operator(
    name: tuple[str, int, str],
    inputs: dict[str, str],
    attributes: dict[str, type],
    types: dict[str, tuple[str, ...]],
    *,
    optional: dict[str, str] | None = None,
    result: str = "T1",
    results: int = 1,
) -> Any:
    """An operator with `results` outputs of the type `result`."""
    onnxscript = require("onnxscript", extra="onnx", purpose="export to ONNX")
    schema = require("onnx", extra="onnx", purpose="export to ONNX").defs.OpSchema
    domain, version, kind = name
    absent = schema.FormalParameterOption.Optional
    attribute_types = {
        int: schema.AttrType.INT,
        float: schema.AttrType.FLOAT,
        str: schema.AttrType.STRING,
        list: schema.AttrType.INTS,
    }
    made = schema(
        kind,
        domain,
        version,
        inputs=[
            *(schema.FormalParameter(n, t) for n, t in inputs.items()),
            *(
                schema.FormalParameter(n, t, param_option=absent)
                for n, t in (optional or {}).items()
            ),
        ],
        outputs=[schema.FormalParameter(f"Y{index}", result) for index in range(results)],
        type_constraints=[(symbol, list(allowed), "") for symbol, allowed in types.items()],
        attributes=[
            schema.Attribute(n, attribute_types[t], "", required=False)
            for n, t in attributes.items()
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(domain, version), kind, made)

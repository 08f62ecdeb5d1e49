"""DequantizeLinear and casts on tensors of small integers, which torch has no types for."""

from __future__ import annotations

from typing import Any

from qalora_compile.exporters.onnx.operators import DEQUANTIZE_BLOCKS, UNPACK_BLOCKS
from qalora_compile.optional import require


def use_small_types(model: Any) -> None:
    """Replace each stand-in by its operator, and retype its bytes, in place.

    The bytes stay unchanged: torch held them as ONNX stores a `[K, N]` tensor of that type (see
    `ir.ops.target_kernels`).
    """
    for node in model.graph.all_nodes():
        if node.op_type == DEQUANTIZE_BLOCKS:
            _replace(node)
        elif node.op_type == UNPACK_BLOCKS:
            _replace_cast(node)


def _replace(node: Any) -> None:
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    k, n, bits, block_size = (
        node.attributes[name].as_int() for name in ("K", "N", "bits", "block_size")
    )
    codes, _, zero_point = node.inputs
    _retype(codes, bits, (k, n))
    _retype(zero_point, bits, (-(-k // block_size), n))
    node.op_type, node.domain = "DequantizeLinear", ""
    for name in ("K", "N", "bits"):
        del node.attributes[name]
    node.attributes.add(ir.AttrInt64("axis", 0))


def _replace_cast(node: Any) -> None:
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    k, n, bits = (node.attributes[name].as_int() for name in ("K", "N", "bits"))
    _retype(node.inputs[0], bits, (k, n))
    node.op_type, node.domain = "Cast", ""
    node.attributes.clear()
    node.attributes.add(ir.AttrInt64("to", ir.DataType.UINT8))


def _retype(value: Any, bits: int, shape: tuple[int, int]) -> None:
    """Give an initializer of bytes its type; one that several layers read may already have it."""
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    kind = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
    if tuple(value.const_value.shape) == shape and value.dtype == kind:
        return
    stored = value.const_value

    def make() -> Any:
        raw = stored.numpy()
        if bits == 8:
            return ir.Tensor(raw.reshape(shape), name=value.name)
        return ir.PackedTensor(raw, kind, shape=ir.Shape(shape), name=value.name)

    value.const_value = ir.LazyTensor(make, kind, ir.Shape(shape), name=value.name)
    value.type, value.shape = ir.TensorType(kind), ir.Shape(shape)

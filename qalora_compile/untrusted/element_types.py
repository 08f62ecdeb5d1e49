"""One table of tensor element types and their names in each format; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ElementType:
    """One type.

    Attributes:
        name: Name in torch, and in numpy if it has the type.
        bits: Size of an element.
        safetensors: Name in safetensors; empty if the format does not have the type.
        onnx: Number in `onnx.TensorProto.DataType`; 0 if ONNX does not have the type.
        short: Name in printed programs; empty if they use `name`.
    """

    name: str
    bits: int
    safetensors: str = ""
    onnx: int = 0
    short: str = ""


PROGRAM_TYPES = (
    ElementType("float64", 64, "F64", 11, "f64"),
    ElementType("float32", 32, "F32", 1, "f32"),
    ElementType("float16", 16, "F16", 10, "f16"),
    ElementType("bfloat16", 16, "BF16", 16, "bf16"),
    ElementType("int64", 64, "I64", 7, "i64"),
    ElementType("int32", 32, "I32", 6, "i32"),
    ElementType("int16", 16, "I16", 5),
    ElementType("int8", 8, "I8", 3),
    ElementType("uint8", 8, "U8", 2, "u8"),
    ElementType("bool", 8, "BOOL", 9, "b8"),
)
"""The types of the tensors of a program."""
PACKED_TYPES = (ElementType("uint4", 4, onnx=21), ElementType("uint2", 2, onnx=25))
"""The types of codes in an exported model."""
UNSIGNED_TYPES = (
    ElementType("uint64", 64, "U64", 13),
    ElementType("uint32", 32, "U32", 12),
    ElementType("uint16", 16, "U16", 4),
)
_OTHERS = (
    ElementType("complex64", 64, "C64", 14),
    ElementType("complex128", 128, onnx=15),
    ElementType("float8_e4m3fn", 8, "F8_E4M3", 17),
    ElementType("float8_e4m3fnuz", 8, "F8_E4M3FNUZ", 18),
    ElementType("float8_e5m2", 8, "F8_E5M2", 19),
    ElementType("float8_e5m2fnuz", 8, "F8_E5M2FNUZ", 20),
    ElementType("float8_e8m0fnu", 8, "F8_E8M0", 24),
    ElementType("float6_e2m3fn", 6, "F6_E2M3"),
    ElementType("float6_e3m2fn", 6, "F6_E3M2"),
    ElementType("float4_e2m1fn", 4, "F4", 23),
    ElementType("int4", 4, onnx=22),
    ElementType("int2", 2, onnx=26),
)
ELEMENT_TYPES = (*PROGRAM_TYPES, *UNSIGNED_TYPES, *PACKED_TYPES, *_OTHERS)
"""All types that a file may name; most are known only to be measured and refused."""

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32", "float64")

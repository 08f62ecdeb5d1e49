"""Methods that choose codes, scales and offsets, one per file, behind one protocol."""

from __future__ import annotations

from qalora_compile.quantizers.base import Method, QuantizedWeight, Quantizer
from qalora_compile.quantizers.registry import (
    as_stored,
    data_needed,
    get_method,
    get_quantizer,
    needs_data,
    quantize_weight,
    without_data,
)

__all__ = [
    "Method",
    "QuantizedWeight",
    "Quantizer",
    "as_stored",
    "data_needed",
    "get_method",
    "get_quantizer",
    "needs_data",
    "quantize_weight",
    "without_data",
]

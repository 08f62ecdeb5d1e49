"""Methods that choose codes, scales and offsets, one per file, behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
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

_HOMES = {
    "Method": "base",
    "QuantizedWeight": "base",
    "Quantizer": "base",
    "as_stored": "registry",
    "data_needed": "registry",
    "get_method": "registry",
    "get_quantizer": "registry",
    "needs_data": "registry",
    "quantize_weight": "registry",
    "without_data": "registry",
}

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


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)

"""How codes, scales and offsets are chosen. One method a file, behind one protocol."""

from __future__ import annotations

from qalora_compile.quantizers.base import Quantizer, get_quantizer

__all__ = ["Quantizer", "get_quantizer"]

"""ONNX: translate a legalized program with torch.onnx, tidy the graph and write it."""

from __future__ import annotations

from qalora_compile.exporters.onnx.write import write_onnx

__all__ = ["write_onnx"]

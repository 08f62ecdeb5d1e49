"""The optional library `openvino`, imported on first use."""

from __future__ import annotations

from typing import Any

from qalora_compile.optional import require


def openvino(module: str = "") -> Any:
    """The package `openvino`, or a module of it.

    Args:
        module: Name below the package, for example `"opset13"`.

    Raises:
        UnsupportedError: it is not installed; the message has the pip command.
    """
    name = f"openvino.{module}" if module else "openvino"
    return require(name, extra="openvino", purpose="export to OpenVINO")


def operators() -> Any:
    """The operator set that is written."""
    return openvino("opset13")

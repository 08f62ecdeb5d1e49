"""Translations of ATen operators that torch.onnx knows only in their decomposed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def aten_table(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → function that emits its ONNX node, for graphs that are not decomposed first."""

    def cast(x: Any, dtype: int | None) -> Any:
        return (
            op.Identity(x) if dtype is None or int(dtype) == int(x.dtype) else op.Cast(x, to=dtype)
        )

    def emit_to_dtype(
        x: Any,
        dtype: int,
        non_blocking: bool = False,
        copy: bool = False,
        memory_format: Any = None,
    ) -> Any:
        return cast(x, dtype)

    def emit_to_device(
        x: Any,
        device: Any,
        dtype: int,
        non_blocking: bool = False,
        copy: bool = False,
        memory_format: Any = None,
    ) -> Any:
        return cast(x, dtype)

    def emit_to_dtype_layout(
        x: Any,
        dtype: int | None = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
        non_blocking: bool = False,
        copy: bool = False,
        memory_format: Any = None,
    ) -> Any:
        return cast(x, dtype)

    def emit_and(x: Any, y: Any) -> Any:
        return op.And(x, y) if x.dtype == _BOOL == y.dtype else op.BitwiseAnd(x, y)

    def emit_or(x: Any, y: Any) -> Any:
        return op.Or(x, y) if x.dtype == _BOOL == y.dtype else op.BitwiseOr(x, y)

    aten = torch.ops.aten
    return {
        aten.to.dtype: emit_to_dtype,
        aten.to.device: emit_to_device,
        aten.to.dtype_layout: emit_to_dtype_layout,
        aten.__and__.Tensor: emit_and,
        aten.__or__.Tensor: emit_or,
    }


_BOOL = 9
"""ONNX's number of the type, with which `ir.DataType` can be compared."""

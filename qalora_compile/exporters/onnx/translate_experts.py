"""Translations of the operators on stacked experts: one layer per expert, then one Concat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qalora_compile.ir.torch_internals import GROUPED_MM

_INT64 = 7


def expert_table(
    op: Any, kernels: dict[Callable[..., Any], Callable[..., Any]]
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → function that emits its ONNX nodes.

    Args:
        op: The onnxscript opset to emit with.
        kernels: The emitter of the layer of one expert, by the operator for one matrix.
    """
    return _kernel_table(op, kernels) | _float_table(op)


def _kernel_table(
    op: Any, kernels: dict[Callable[..., Any], Callable[..., Any]]
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The quantized layers of each target."""
    ops = torch.ops.qalora
    nbits, blocks = kernels[ops.matmul_nbits.default], kernels[ops.matmul_blocks.default]
    group_quant = kernels[ops.group_quant_linear.default]

    def emit_expert_matmul_nbits(
        x: Any,
        sums: Any,
        qweight: Any,
        scale: Any,
        zero_point: Any,
        correction: Any,
        group_offsets: Any,
        bits: int,
        block_size: int,
        accuracy_level: int,
    ) -> Any:
        options = {"bias": None, "bits": bits, "block_size": block_size}
        emit = partial(nbits, accuracy_level=accuracy_level, **options)
        stacks, n = (qweight, scale, zero_point), int(qweight[0].shape[0])
        return _layers(op, emit, x, sums, stacks, correction, group_offsets, n)

    def emit_expert_matmul_blocks(
        x: Any,
        sums: Any,
        codes: Any,
        scale: Any,
        zero_point: Any,
        correction: Any,
        group_offsets: Any,
        bits: int,
        block_size: int,
    ) -> Any:
        emit = partial(blocks, bits=bits, block_size=block_size)
        stacks = (codes, scale, zero_point)
        return _layers(op, emit, x, sums, stacks, correction, group_offsets, int(scale[0].shape[1]))

    def emit_expert_group_quant_linear(
        x: Any,
        codes: Any,
        scale: Any,
        zero_point: Any,
        group_offsets: Any,
        bits: int,
        group_size: int,
        compute: str,
    ) -> Any:
        emit = partial(group_quant, bits=bits, group_size=group_size, compute=compute)
        stacks = (codes, scale, zero_point)
        return _layers(op, emit, x, None, stacks, None, group_offsets, int(codes[0].shape[0]))

    return {
        ops.expert_matmul_nbits.default: emit_expert_matmul_nbits,
        ops.expert_matmul_blocks.default: emit_expert_matmul_blocks,
        ops.expert_group_quant_linear.default: emit_expert_group_quant_linear,
    }


def _layers(
    op: Any,
    emit: Callable[..., Any],
    x: Any,
    sums: Any,
    stacks: tuple[Any, ...],
    correction: Any,
    group_offsets: Any,
    n: int,
) -> Any:
    """`emit` with each expert's own weights, and its correction if it has one."""
    k = int(x.shape[-1])

    def compute(expert: int, rows: Any, group_sums: Any) -> Any:
        y = emit(rows, *(stack[expert] for stack in stacks), k=k)
        if group_sums is None:
            return y
        return op.Add(y, op.MatMul(group_sums, correction[expert]))

    return _by_expert(op, group_offsets, len(stacks[0]), n, compute, x, sums)


def _float_table(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Adapters that are not folded, and experts that stay in float."""

    def emit_expert_adapter(
        pooled: Any, lora_a: Any, lora_b: Any, group_offsets: Any, scaling: float
    ) -> Any:
        factor = op.Constant(value_float=scaling)

        def compute(expert: int, rows: Any) -> Any:
            a, b = (
                op.Transpose(_take(op, stack, expert), perm=[1, 0]) for stack in (lora_a, lora_b)
            )
            return op.Mul(op.MatMul(op.MatMul(rows, a), b), factor)

        experts, n = int(lora_b.shape[0]), int(lora_b.shape[1])
        return _by_expert(op, group_offsets, experts, n, compute, pooled)

    emit_grouped_mm = partial(_grouped_mm, op)
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.qalora.expert_adapter.default: emit_expert_adapter,
        GROUPED_MM: emit_grouped_mm,
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):  # registered by transformers
        table[torch.ops.transformers.grouped_mm_fallback.default] = emit_grouped_mm
    return table


def _grouped_mm(
    op: Any, x: Any, weight: Any, group_offsets: Any, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Emit experts that stay in float."""
    if len(weight.shape) != 3 or group_offsets is None or bias is not None or out_dtype is not None:
        raise ValueError("only x [T, K] by stacked experts [E, K, N], without bias or out_dtype")

    def compute(expert: int, rows: Any) -> Any:
        return op.MatMul(rows, _take(op, weight, expert))

    return _by_expert(op, group_offsets, int(weight.shape[0]), int(weight.shape[2]), compute, x)


def _by_expert(
    op: Any, group_offsets: Any, experts: int, n: int, compute: Callable[..., Any], *operands: Any
) -> Any:
    """Concat of `compute(e, rows…)` on the rows of each group, or on x[e] without group offsets.

    Rows after the last group give rows of `n` zeros, as the operators define.
    """
    axis = op.Constant(value_ints=[0])
    stops = []
    if group_offsets is not None:
        places = op.Cast(group_offsets, to=_INT64)
        at = [op.Constant(value_ints=[expert]) for expert in range(experts + 1)]
        stops = [op.Slice(places, at[e], at[e + 1], axis) for e in range(experts)]
    parts = []
    for expert in range(experts):
        if group_offsets is None:
            rows = [None if x is None else _take(op, x, expert) for x in operands]
            parts.append(op.Unsqueeze(compute(expert, *rows), axis))
        else:
            start = stops[expert - 1] if expert else axis
            rows = [
                None if x is None else op.Slice(x, start, stops[expert], axis) for x in operands
            ]
            parts.append(compute(expert, *rows))
    if group_offsets is not None:
        x = operands[0]
        left = op.Sub(op.Shape(x, start=0, end=1), stops[-1])
        size = op.Concat(left, op.Constant(value_ints=[n]), axis=0)
        parts.append(op.CastLike(op.ConstantOfShape(size), x))
    return op.Concat(*parts, axis=0)


def _take(op: Any, x: Any, expert: int) -> Any:
    """x[e]."""
    return op.Gather(x, op.Constant(value_int=expert), axis=0)

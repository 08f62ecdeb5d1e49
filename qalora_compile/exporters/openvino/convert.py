"""`convert`: a legalized program as a model of OpenVINO, by its frontend for `torch.fx`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.nn import functional

from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.onnx.exported import retrace
from qalora_compile.exporters.openvino.experts import emit_expert_adapter, emit_grouped_mm
from qalora_compile.exporters.openvino.library import openvino
from qalora_compile.exporters.openvino.padding import emit_pad_groups
from qalora_compile.exporters.openvino.weights import Weights
from qalora_compile.exporters.traced import pooled_adapter, with_values
from qalora_compile.ir.affine import sum_groups
from qalora_compile.ir.ops.embedding import BlockEmbedding
from qalora_compile.ir.ops.target_kernels import ExpertGroupQuantLinear, GroupQuantLinear
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import (
    BLOCK_EMBEDDING,
    EXPERT_ADAPTER,
    EXPERT_GROUP_QUANT_LINEAR,
    GROUP_QUANT_LINEAR,
    GROUP_SUM,
    PAD_GROUPS,
    POOLED_ADAPTER,
)
from qalora_compile.ir.torch_internals import GROUPED_MM

_FRONTEND = "frontend.pytorch"
_GROUPED_FALLBACK = "transformers.grouped_mm_fallback.default"
_REFUSED = re.compile(r"(?:No conversion rule found for operations|failed for): ([^\n]+)")


def convert(program: Program) -> tuple[Any, Weights]:
    """Convert the graph.

    Args:
        program: Lowered for target `openvino`, or a float program.

    Returns:
        The model, whose inputs and outputs are in the order of the program's signature, and the
        products of its quantized layers.

    Raises:
        UnsupportedError: the frontend has no rule for an operator; it is named.
    """
    program = with_values(program)
    frontend = openvino("frontend").FrontEndManager().load_by_framework("pytorch")
    extension = openvino(_FRONTEND).ConversionExtension
    weights = Weights(program.tensors())
    for operator, emit in (
        (GROUP_QUANT_LINEAR, weights.emit_linear),
        (EXPERT_GROUP_QUANT_LINEAR, weights.emit_experts),
        (EXPERT_ADAPTER, emit_expert_adapter),
        (GROUPED_MM, emit_grouped_mm),
        (_GROUPED_FALLBACK, emit_grouped_mm),
        (BLOCK_EMBEDDING, weights.emit_embedding),
        (PAD_GROUPS, emit_pad_groups),
    ):
        frontend.add_extension(extension(str(operator), emit))
    with program.evaluating(), _quiet():
        exported = retrace(program).run_decompositions(_decompositions())
        decoder = _decoder(exported, program)
        try:
            model = frontend.convert(frontend.load(decoder))
        except openvino("frontend").OpConversionFailure as error:
            raise UnsupportedError(
                f"OpenVINO cannot convert {_operators_in(str(error))}",
                hint="target ort or onnx may hold the model; or replace the operator in the model",
            ) from error
    return model, weights


def _decoder(exported: ExportedProgram, program: Program) -> Any:
    """What the frontend reads. Its own constructor for exported programs traces them once more."""
    decoder = openvino(f"{_FRONTEND}.fx_decoder").TorchFXPythonDecoder
    shapes = [
        None
        if leaf.dtype is None
        else [-1 if isinstance(size, str) else size for size in leaf.shape]
        for leaf in program.signature.inputs
    ]
    return decoder(exported.module(), dynamic_shapes=True, input_shapes=shapes)


def _decompositions() -> Any:
    """Torch's decompositions, without those of operators that the frontend converts directly."""
    table: Any = torch.export.default_decompositions()
    kept = openvino(f"{_FRONTEND}.torchdynamo.export_decompositions").ops_to_not_decompose()
    for operator in kept:
        with suppress(KeyError):  # torch does not decompose it either
            table.pop(operator)
    table.update(_OWN)
    return table


_HIDDEN = torch.finfo(torch.float32).min / 2
"""What is added to the score of a hidden key."""


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as the frontend and OpenVINO's kernels take it.

    The frontend ignores `enable_gqa`, so heads of keys and values are repeated; the CPU plugin
    removes the repetition again when it fuses attention with its cache. A row whose boolean mask
    hides every key, which padding has, becomes NaN in OpenVINO and then spreads; so the mask is a
    large negative number, with which hidden keys still have the weight 0, exactly, in other rows.
    """
    masked = attn_mask is not None and attn_mask.dtype == torch.bool
    if not enable_gqa and not masked:
        return NotImplemented  # torch then keeps the operator
    if attn_mask is not None and masked:
        attn_mask = attn_mask.logical_not().to(query.dtype) * _HIDDEN
    repeat = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if repeat > 1:
        key, value = (
            x.unsqueeze(-3).expand(*x.shape[:-2], repeat, *x.shape[-2:]).flatten(-4, -3)
            for x in (key, value)
        )
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale
    )


def _histogram(x: Tensor, bins: int = 100, low: float = 0, high: float = 0) -> Any:
    """`aten.histc` between stated ends: how many tokens each expert has."""
    if not low < high:
        return NotImplemented  # the ends are those of the values
    place = ((x.flatten() - low) * (bins / (high - low))).floor().clamp(max=bins - 1)
    inside = ((x >= low) & (x <= high)).flatten()
    found = place[:, None] == torch.arange(bins, dtype=x.dtype)
    return (found & inside[:, None]).to(x.dtype).sum(0)


def _empty(size: list[int], _: list[int], *, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    """`aten.empty_permuted`, all of which is written afterwards."""
    return torch.zeros(size, dtype=dtype)


_OWN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.histc.default: _histogram,
    torch.ops.aten.empty_permuted.default: _empty,
    GROUP_SUM: sum_groups,
    POOLED_ADAPTER: pooled_adapter,
}
"""What other operators of ATen are the parts of."""


def _operators_in(message: str) -> str:
    """The operators that a message of the frontend names."""
    found = [name for line in _REFUSED.findall(message) for name in line.split(", ")]
    return ", ".join(dict.fromkeys(found)) or message.strip().splitlines()[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of torch's tracing off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layers_of(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """The layers on codes of a lowered graph in order, with the path of their weight."""
    for node in program.graph.nodes:
        if node.target is GROUP_QUANT_LINEAR:
            codes = GroupQuantLinear.of(node).codes
        elif node.target is EXPERT_GROUP_QUANT_LINEAR:
            codes = ExpertGroupQuantLinear.of(node).codes[0]
        elif node.target is BLOCK_EMBEDDING:
            codes = BlockEmbedding.of(node).codes
        else:
            continue
        yield node, str(codes.target).removesuffix(".qweight")

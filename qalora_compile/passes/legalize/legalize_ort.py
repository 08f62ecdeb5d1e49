"""legalize-ort: GroupQuantLinear, which takes the real-valued folded zero-points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.config import ACCURACY_LEVELS, PARAMETER_DTYPES, one_of
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.lazy_tensor import holds
from qalora_compile.ir.ops.embedding import BlockEmbedding
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.target_kernels import ExpertGroupQuantLinear, GroupQuantLinear
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.packing.kernel_layouts import pack_groups, padded_group
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.legalize.base import Layer, LegalizePass, Lowered, add_bias, pad_input
from qalora_compile.passes.legalize.block_layout import widen_groups

_COMPUTE = {0: "fp32", 2: "int16", 4: "int8"}
"""The attribute `compute` of GroupQuantLinear by accuracy level."""


@dataclass(frozen=True)
class GroupLayout:
    """How groups of a weight are laid out for GroupQuantLinear.

    Attributes:
        group_size: Of the layer, at most K.
        width: Stored codes per group, a multiple of 16.
        padded: The stored groups together are longer than K, so x must be padded in the same way.
    """

    group_size: int
    width: int
    padded: bool

    @classmethod
    def choose(cls, layer: Layer) -> GroupLayout:
        """The layout that pads groups, the tail group too, to a multiple of 16 with zero codes."""
        group_size = min(layer.group_size, layer.k)
        width = padded_group(group_size)
        return cls(group_size, width, width * group_count(layer.k, group_size) != layer.k)


@dataclass(frozen=True, kw_only=True)
class LegalizeOrt(LegalizePass):
    """Rewrite every group_linear for ONNX Runtime with this package's operator library.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = qalora.group_quant_linear(%x, @fc.qweight, @fc.scale, @fc.zero_point, 4, 32, fp32)
             %2 = aten.add.Tensor(%1, @fc.bias)

    with `zero_point = −offset / scale`, a real number, `[N, L]`. A group whose scale is 0, or so
    small that the quotient is not finite, has codes 0, scale 1 and zero-point −offset.

    Fires on: every group_linear, and every expert_linear, which becomes one
    `qalora.expert_group_quant_linear`, and every group_embedding, which becomes a
    `qalora.block_embedding`. Where groups are not a multiple of 16, or K is not a multiple of the
    group size, the stored groups and x are padded (`pad_groups`).
    Leaves alone: adapters that were not folded.
    Exactness: exact in real arithmetic; zero_point is rounded once to float32. With
    `parameter_dtype="float16"`, scale and zero_point are rounded to float16.

    Options:
        accuracy_level: As `ExportSpec.accuracy_level`.
        parameter_dtype: As `ExportSpec.parameter_dtype`.
    """

    name: ClassVar[str] = "legalize-ort"
    produces: ClassVar[str | None] = f"{LEGALIZED}ort"
    kernel: ClassVar[str] = "GroupQuantLinear"

    accuracy_level: int = 0
    parameter_dtype: str = "float32"

    def __post_init__(self) -> None:
        one_of("accuracy_level", self.accuracy_level, ACCURACY_LEVELS)
        one_of("parameter_dtype", self.parameter_dtype, PARAMETER_DTYPES)

    def lower_weight(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """Tensors of GroupQuantLinear.

        Raises:
            UserInputError: a scale or zero-point does not fit float16.
        """
        return lower_groups(qweight, scale, offset, layer, getattr(torch, self.parameter_dtype))

    def describe(self, layer: Layer) -> tuple[str, str]:
        """Bits and group size, and the padding and rounding."""
        layout = GroupLayout.choose(layer)
        why = "exact"
        if self.parameter_dtype == "float16":
            why = "scale and zero-point rounded to float16"
        if layout.width != layout.group_size:
            why += f"; groups of {layout.group_size} padded to {layout.width}"
        elif layout.padded:
            why += f"; tail group padded to {layout.width}"
        return f"GroupQuantLinear, {layer.bits} bits, groups of {layout.width}", why

    def emit(
        self, graph: fx.Graph, own: GroupLinear | ExpertLinear, layer: Layer, lowered: Lowered
    ) -> fx.Node:
        """GroupQuantLinear, then the bias, as an ONNX function has no optional inputs."""
        layout, parts = GroupLayout.choose(layer), lowered.parts
        options = layer.bits, layout.width
        compute = _COMPUTE[self.accuracy_level]
        x = pad_input(graph, own.x, layout.group_size, layout.width, layout.padded)
        if isinstance(own, ExpertLinear):
            group_offsets = own.group_offsets
            return ExpertGroupQuantLinear.create(graph, x, *parts, group_offsets, *options, compute)
        y = GroupQuantLinear.create(graph, x, *parts, *options, compute)
        return add_bias(graph, y, own.bias)

    def emit_rows(self, graph: fx.Graph, ids: fx.Node, layer: Layer, lowered: Lowered) -> fx.Node:
        """The lookup in the tensors of GroupQuantLinear."""
        width = GroupLayout.choose(layer).width
        return BlockEmbedding.create(graph, ids, *lowered.parts, layer.bits, width, layer.k)


def lower_groups(
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    layer: Layer,
    dtype: torch.dtype,
    stored_bits: int | None = None,
) -> dict[str, Tensor]:
    """Tensors of GroupQuantLinear from packed codes `[N, ·]`, scale and offset `[N, L]`.

    Args:
        qweight: Codes of `layer.bits` bits.
        scale: Step of each group.
        offset: Value of code 0 in each group.
        layer: The format of the weight.
        dtype: Of scale and zero-point.
        stored_bits: Width in which codes are stored; None takes that of the layer.

    Returns:
        `qweight` `[N, L, width · bits / 8]` uint8; `scale` and `zero_point` `[N, L]` of `dtype`.

    Raises:
        UserInputError: a scale or zero-point does not fit `dtype`.
    """
    layout = GroupLayout.choose(layer)
    codes = widen_groups(
        unpack_codes(qweight, layer.bits, layer.k), layout.group_size, layout.width
    )
    scale, zero_point = scale.double(), -offset.double()
    ratio = zero_point / torch.where(scale == 0, 1.0, scale)
    flat = (scale == 0) | ~torch.isfinite(ratio.float())
    codes = codes.unflatten(1, (-1, layout.width)) * ~flat[..., None]
    stored = {
        "scale": torch.where(flat, 1.0, scale).to(dtype),
        "zero_point": torch.where(flat, zero_point, ratio).to(dtype),
    }
    for name, tensor in stored.items():
        if not holds(torch.isfinite(tensor).all()):
            raise UserInputError(
                f"a {name} does not fit {dtype}".replace("torch.", ""),
                hint="export with parameter_dtype float32",
            )
    if not holds(stored["scale"].ne(0).all()):
        raise UserInputError(
            f"a scale is too small for {dtype}".replace("torch.", ""),
            hint="export with parameter_dtype float32",
        )
    width = stored_bits or layer.bits
    packed = pack_groups(codes.flatten(1), bits=width, group_size=layout.width)
    return {"qweight": packed} | stored

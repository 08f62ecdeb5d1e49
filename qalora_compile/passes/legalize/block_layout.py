"""Groups laid out as the blocks that MatMulNBits takes, with integer zero-points and a correction.

Shared by `legalize-ort-stock` and `legalize-onnx`, which pack the same blocks differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.ir.affine import group_count
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.packing.kernel_layouts import largest_block, padded_group, stored_bits


@dataclass(frozen=True)
class BlockLayout:
    """How groups of a weight are laid out as MatMulNBits blocks.

    Attributes:
        bits: Width of the stored codes: 2, 4 or 8.
        block_size: A power of two from 16 to 256.
        width: Stored codes per group; more than the group size where groups are padded.
        padded: Groups are padded, so x must be padded in the same way.
    """

    bits: int
    block_size: int
    width: int
    padded: bool

    @classmethod
    def choose(cls, *, bits: int, group_size: int, k: int, narrow: bool) -> BlockLayout:
        """The layout for a weight of `k` columns; `narrow` as for `stored_bits`."""
        stored, width = stored_bits(bits, narrow=narrow), padded_group(group_size)
        return cls(stored, largest_block(width), width, width != group_size and k > group_size)

    def describe(self, bits: int, group_size: int) -> str:
        """How the stored form differs from the layer's own bits and group size."""
        why = "exact"
        if self.bits != bits:
            why = f"{bits}-bit codes stored in {self.bits} bits: no fast kernel for {bits}"
        if self.padded:
            why += f"; groups of {group_size} padded to {self.width}: no kernel for {group_size}"
        return why


@dataclass(frozen=True)
class Blocks:
    """A weight in blocks.

    Attributes:
        codes: `[N, Lb · block_size]` uint8; 0 past the last column.
        scale: `[N, Lb]` float32.
        zero_point: `[N, Lb]` uint8.
        correction: C, `[L, N]` float64: `(offset + scale · zero_point)ᵀ` of the groups.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    correction: Tensor


def to_blocks(
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group_size: int,
    k: int,
    layout: BlockLayout,
) -> Blocks:
    """Blocks from packed codes `[N, ·]`, scale and offset `[N, L]`."""
    groups = scale.shape[1]
    wide_scale, wide_offset = scale.double(), offset.double()
    ratio = torch.where(wide_scale == 0, 0.0, -wide_offset / wide_scale)
    zero_point = ratio.round().clamp(0, 2**layout.bits - 1)
    codes = unpack_codes(qweight, bits, k)
    if layout.padded:
        codes = widen_groups(codes, group_size, layout.width)
    span = layout.width if layout.padded or groups == 1 else group_size
    blocks = group_count(codes.shape[1], layout.block_size)
    codes = functional.pad(codes, (0, blocks * layout.block_size - codes.shape[1]))
    group_of_block = torch.arange(blocks) * layout.block_size // span
    return Blocks(
        codes=codes,
        scale=scale[:, group_of_block].float().contiguous(),
        zero_point=zero_point[:, group_of_block].to(torch.uint8),
        correction=(wide_offset + wide_scale * zero_point).t(),
    )


def widen_groups(codes: Tensor, group_size: int, width: int) -> Tensor:
    """Zero-pad each group of `[N, K]` codes to `width`: `[N, L · width]`."""
    groups = group_count(codes.shape[1], group_size)
    padded = functional.pad(codes, (0, groups * group_size - codes.shape[1]))
    grouped = padded.unflatten(1, (groups, group_size))
    return functional.pad(grouped, (0, width - group_size)).flatten(1)

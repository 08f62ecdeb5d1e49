"""Weights that a checkpoint holds quantized already, as they go into a program."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qalora_compile.ir.affine import dequantize


@dataclass(frozen=True)
class StoredWeight:
    """`W = scale · codes + offset`, in the storage of a program.

    Attributes:
        qweight: `[N, ceil(K / 8) · bits]` uint8, see `ir.packing`.
        scale: `[N, L]` float32.
        offset: `[N, L]` float32.
        bits: Width of a code.
        group_size: g.
        k: K.
    """

    qweight: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    group_size: int
    k: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have below the path of a weight."""
        return {"qweight": self.qweight, "scale": self.scale, "offset": self.offset}

    def dequantize(self) -> Tensor:
        """W, `[N, K]` float32."""
        return dequantize(
            self.qweight,
            self.scale,
            self.offset,
            bits=self.bits,
            group_size=self.group_size,
            k=self.k,
        )

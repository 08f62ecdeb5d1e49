"""Adapted weights in eager modules: how one is computed, and the linear layer that holds one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.affine import dequantize, expand_groups
from qalora_compile.ir.spec import ADAPTED_LINEAR, GROUP_LINEAR, GROUP_SUM, POOLED_ADAPTER
from qalora_compile.ir.stages import ADAPTER_NAMES, CODE_NAMES

PARTS = (*CODE_NAMES, *ADAPTER_NAMES)
"""Names of the tensors of an adapted weight, below its path; lora_A and lora_B are parameters."""


@dataclass(frozen=True)
class AdaptedWeight:
    """The computation of the weight of one path from its tensors.

    Attributes:
        bits: Width of a code.
        group_size: g of the codes.
        pool: Group size of the adapter.
        scaling: alpha / rank times the pooling factor.
        k: K, the row length.
        dtype: Dtype of the weight that it replaces.
        dropout: Probability with which a pooled input of the adapter is dropped in training.
    """

    bits: int
    group_size: int
    pool: int
    scaling: float
    k: int
    dtype: torch.dtype
    dropout: float = 0.0

    def matrix(self, holder: nn.Module) -> Tensor:
        """W + scaling · expand(B A), `[N, K]` or `[E, N, K]`; gradients reach A and B.

        Args:
            holder: The module at the weight's path, with the tensors `PARTS`.
        """
        qweight, scale, offset, lora_a, lora_b = (getattr(holder, part) for part in PARTS)
        lead = qweight.shape[:-2]
        base = dequantize(
            qweight.flatten(0, -2),
            scale.flatten(0, -2),
            offset.flatten(0, -2),
            bits=self.bits,
            group_size=self.group_size,
            k=self.k,
        ).unflatten(0, (*lead, qweight.shape[-2]))
        update = expand_groups(lora_b @ lora_a * self.scaling, self.pool, self.k)
        weight: Tensor = (base + update).to(self.dtype)
        return weight


def register_parts(holder: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module the tensors `PARTS` as the same objects, so that a program shares them."""
    for part in PARTS:
        tensor = tensors[part]
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(part, tensor)
        else:
            holder.register_buffer(part, tensor)


class AdaptedLinear(nn.Module):
    """A quantized linear layer with a pooled adapter: the operators of the graph, in eager form.

    It replaces `nn.Linear`, and GPT-2's `Conv1D`, whose weight is stored `[K, N]`.

    Args:
        weight: How the weight is computed.
        tensors: The tensors `PARTS`: qweight `[N, ceil(K / 8) · bits]` uint8, scale and offset
            `[N, L]`, lora_A `[r, L']`, lora_B `[N, r]`.
        bias: `[N]` or None.
        flipped: Whether code outside reads `weight` as `[K, N]`.
    """

    qweight: Tensor
    scale: Tensor
    offset: Tensor
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815

    def __init__(
        self,
        weight: AdaptedWeight,
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        *,
        flipped: bool,
    ) -> None:
        super().__init__()
        self.adapted, self.flipped = weight, flipped
        self.in_features, self.out_features = weight.k, tensors["scale"].shape[0]
        self.nx, self.nf = self.in_features, self.out_features  # Conv1D's names
        register_parts(self, tensors)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The effective weight, adapter included, for code that reads it past `forward`.

        Fast paths of torch's attention do, for instance. It is computed at each access.

        Raises:
            UnsupportedError: in training with dropout, which no weight can represent.
        """
        if self.training and self.adapted.dropout:
            raise UnsupportedError(
                "the model reads a weight past its layer, where the adapter's input cannot be "
                "dropped",
                hint="train without adapter dropout, or the captured program instead",
            )
        matrix = self.adapted.matrix(self)
        return matrix.t() if self.flipped else matrix

    def forward(self, x: Tensor) -> Tensor:
        """Y = x Wᵀ + b + scaling · (S(x) Aᵀ) Bᵀ, `[.., K]` to `[.., N]`."""
        own = self.adapted
        weight = (self.qweight, self.scale, self.offset, self.bias)
        drops = bool(own.dropout) and self.training
        narrow = x.dtype != self.lora_A.dtype or torch.is_autocast_enabled(x.device.type)
        if not drops and not narrow:
            options = (own.bits, own.group_size, own.pool, own.scaling)
            fused: Tensor = ADAPTED_LINEAR(x, *weight, self.lora_A, self.lora_B, *options)[0]
            return fused
        y: Tensor = GROUP_LINEAR(x, *weight, own.bits, own.group_size)
        pooled: Tensor = GROUP_SUM(x, own.pool)
        if drops:
            pooled = functional.dropout(pooled, own.dropout)
        update: Tensor = POOLED_ADAPTER(pooled, self.lora_A, self.lora_B, own.scaling)
        return y + update

    def extra_repr(self) -> str:
        """Shape, bits, group and rank, as `print(model)` shows them."""
        own = self.adapted
        return (
            f"in_features={own.k}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={own.bits}, group_size={own.group_size}, "
            f"rank={self.lora_A.shape[0]}"
        )

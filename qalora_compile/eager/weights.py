"""Weights of modules whose forward cannot be replaced: recomputed by a parametrization.

Packed attention projections, 1×1 convolutions, stacked experts and modules with hooks of their own
compute with a weight themselves. `torch.nn.utils.parametrize` gives them the effective one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qalora_compile.eager.layers import AdaptedWeight


@dataclass(frozen=True)
class Geometry:
    """Where a matrix is in the memory of a parameter: size, stride and offset in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, base: Tensor) -> Geometry:
        """The geometry of a view of `base`."""
        return cls(
            tuple(view.shape),
            tuple(view.stride()),
            int(view.storage_offset() - base.storage_offset()),
        )


@dataclass(frozen=True)
class Piece:
    """One quantized reading of a parameter.

    Attributes:
        weight: How its matrix is computed.
        holder: The module that has its tensors.
        place: Where the matrix is in the parameter.
    """

    weight: AdaptedWeight
    holder: nn.Module
    place: Geometry


class EffectiveWeight(nn.Module):
    """Parametrization that assembles the pieces of a weight in the parameter's own layout.

    Args:
        pieces: The quantized readings; they do not overlap.
        layout: Layout of the parameter.
        covered: Whether the pieces cover it; otherwise the rest comes from the original.
    """

    def __init__(self, pieces: Sequence[Piece], layout: Geometry, *, covered: bool) -> None:
        super().__init__()
        # In a tuple the holders are not submodules: each tensor has one name, below its path.
        self._pieces = tuple(pieces)
        self._layout, self._covered = layout, covered

    def forward(self, original: Tensor) -> Tensor:
        """The effective weight; `original` gives what no piece covers."""
        dtype = self._pieces[0].weight.dtype
        device = self._pieces[0].holder.scale.device
        assert isinstance(device, torch.device)
        if self._covered:
            size, stride = self._layout.size, self._layout.stride
            weight = torch.empty_strided(size, stride, dtype=dtype, device=device)
        else:
            weight = original.detach().clone(memory_format=torch.preserve_format)
        for piece in self._pieces:
            place = piece.place
            target = weight.as_strided(place.size, place.stride, place.offset)
            target.copy_(piece.weight.matrix(piece.holder))
        return weight


def parametrize_weight(module: nn.Module, name: str, pieces: Sequence[Piece]) -> Callable[[], None]:
    """Make `module.<name>` the effective weight of `pieces`; return a function that undoes it.

    If the pieces cover the parameter, it is freed, and the state dict only holds their tensors.
    """
    parameter = getattr(module, name)
    assert isinstance(parameter, nn.Parameter)
    layout = Geometry.of(parameter, parameter)
    read = sum(torch.Size(piece.place.size).numel() for piece in pieces)
    covered = read == parameter.numel()
    weight = EffectiveWeight(pieces, layout, covered=covered)
    parametrize.register_parametrization(module, name, weight, unsafe=True)
    of_module = module.parametrizations
    assert isinstance(of_module, nn.ModuleDict)
    slot = of_module[name]
    if covered:
        del slot.original
        slot.register_buffer("original", parameter.new_empty(0), persistent=False)

    def undo() -> None:
        del slot.original
        slot.register_parameter("original", parameter)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)

    return undo

"""Parametrized weights: pieces in their places, names, and how they are undone."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from qalora_compile.eager.layers import PARTS, AdaptedWeight, register_parts
from qalora_compile.eager.weights import Geometry, Piece, parametrize_weight
from tests.eager.test_layers import make_parts


class Packed(nn.Module):
    """A weight `[rows, 32]` with two pieces of 6 rows below the path `piece`."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 32, dtype=torch.float64))


def make(rows: int, *, transposed: bool = False) -> tuple[Packed, list[Piece], list[Tensor]]:
    torch.manual_seed(0)
    module = Packed(rows)
    if transposed:
        module.weight = nn.Parameter(torch.randn(32, rows, dtype=torch.float64))
    base = module.weight.detach()
    matrices, pieces = [], []
    for index in range(2):
        parts, matrix = make_parts(6, 32, 4, 16, 16, rank=2)
        holder = nn.Module()
        register_parts(holder, parts)
        module.add_module(f"piece{index}", holder)
        view = (base.t() if transposed else base)[6 * index : 6 * (index + 1)]
        how = AdaptedWeight(4, 16, 16, 0.5, 32, torch.float64)
        pieces.append(Piece(how, holder, Geometry.of(view, base)))
        matrices.append(matrix)
    return module, pieces, matrices


@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_that_cover_the_parameter_replace_it(transposed: bool) -> None:
    module, pieces, matrices = make(12, transposed=transposed)
    stride = module.weight.stride()
    parametrize_weight(module, "weight", pieces)
    weight = module.weight
    assert weight.stride() == stride
    torch.testing.assert_close(weight.t() if transposed else weight, torch.cat(matrices))
    assert set(module.state_dict()) == {f"piece{i}.{part}" for i in range(2) for part in PARTS}
    weight.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    assert len(list(module.parameters())) == 4


def test_what_no_piece_covers_stays_as_it_was() -> None:
    module, pieces, matrices = make(20)
    before = module.weight.detach().clone()
    parametrize_weight(module, "weight", pieces)
    torch.testing.assert_close(module.weight[:12], torch.cat(matrices))
    assert torch.equal(module.weight[12:], before[12:])


@pytest.mark.parametrize("rows", [12, 20])
def test_undo_brings_the_very_parameter_back(rows: int) -> None:
    module, pieces, _ = make(rows)
    parameter, before = module.weight, module.weight.detach().clone()
    undo = parametrize_weight(module, "weight", pieces)
    undo()
    assert module.weight is parameter and type(module) is Packed
    assert torch.equal(module.weight, before)


def test_a_deep_copy_reads_its_own_tensors() -> None:
    module, pieces, _ = make(12)
    parametrize_weight(module, "weight", pieces)
    other: Any = copy.deepcopy(module)
    with torch.no_grad():
        cast("Tensor", other.piece0.lora_B).zero_()
    assert not torch.equal(other.weight, module.weight)
    assert torch.equal(other.weight[6:], module.weight[6:])

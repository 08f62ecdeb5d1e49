"""`GroupAffine` and the group helpers against loops over plain numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import (
    GroupAffine,
    dequantize,
    expand_groups,
    group_count,
    sum_groups,
)

BITS = st.sampled_from(SUPPORTED_BITS)


def make_affine(
    n: int, k: int, bits: int, group_size: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> GroupAffine:
    """A random quantized weight."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    scale = torch.rand(n, groups, generator=generator, dtype=torch.float64) + 0.01
    offset = torch.randn(n, groups, generator=generator, dtype=torch.float64)
    return GroupAffine(codes, scale.to(dtype), offset.to(dtype), bits, group_size)


def plain_weight(affine: GroupAffine) -> Tensor:
    """W by the formula, one element at a time."""
    n, k = affine.codes.shape
    rows = [
        [
            affine.scale[i, j // affine.group_size].item() * affine.codes[i, j].item()
            + affine.offset[i, j // affine.group_size].item()
            for j in range(k)
        ]
        for i in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@given(
    n=st.integers(1, 4),
    k=st.integers(1, 40),
    bits=BITS,
    g=st.integers(1, 45),
    seed=st.integers(0, 99),
)
def test_dequantize_is_the_plain_formula(n: int, k: int, bits: int, g: int, seed: int) -> None:
    affine = make_affine(n, k, bits, g, seed=seed)
    expected = plain_weight(affine)
    packed = dequantize(affine.pack(), affine.scale, affine.offset, bits=bits, group_size=g, k=k)
    assert packed.shape == expected.shape
    assert torch.allclose(packed, expected, rtol=0, atol=1e-12)
    assert torch.allclose(affine.dequantize(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantize_keeps_the_dtype_of_scale_and_its_inputs(dtype: torch.dtype) -> None:
    affine = make_affine(3, 19, 4, 8, dtype)
    before = [t.clone() for t in (affine.codes, affine.scale, affine.offset)]
    weight = dequantize(affine.pack(), affine.scale, affine.offset, bits=4, group_size=8, k=19)
    assert weight.dtype == dtype
    for now, then in zip((affine.codes, affine.scale, affine.offset), before, strict=True):
        assert torch.equal(now, then)


@given(k=st.integers(1, 50), g=st.integers(1, 55), seed=st.integers(0, 99))
def test_sum_groups_is_a_loop_over_groups(k: int, g: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, k, generator=generator, dtype=torch.float64)
    parts = [x[..., start : start + g].sum(-1) for start in range(0, k, g)]
    sums = sum_groups(x, g)
    assert sums.shape[-1] == group_count(k, g) == len(parts)
    assert torch.allclose(sums, torch.stack(parts, -1), rtol=0, atol=1e-12)


@given(k=st.integers(1, 50), g=st.integers(1, 55))
def test_expand_groups_repeats_and_cuts_the_tail(k: int, g: int) -> None:
    values = torch.arange(group_count(k, g), dtype=torch.float64)[None]
    assert expand_groups(values, g, k).tolist() == [[float(j // g) for j in range(k)]]


def test_zero_point_is_derived_real_and_zero_where_flat() -> None:
    affine = GroupAffine(
        torch.zeros(1, 4, dtype=torch.uint8),
        torch.tensor([[0.5, 0.0]]),
        torch.tensor([[-1.75, 3.0]]),
        4,
        2,
    )
    assert affine.zero_point().tolist() == [[3.5, 0.0]]
    assert affine.dequantize().tolist() == [[-1.75, -1.75, 3.0, 3.0]]


def test_validate_returns_a_sound_weight_itself() -> None:
    affine = make_affine(3, 10, 3, 4)
    assert affine.validate() is affine
    assert affine.shape == (3, 10)
    assert affine.groups == 3


BREAKAGE: dict[str, tuple[dict[str, object], str]] = {
    "bits": ({"bits": 5}, "bits 5"),
    "group size": ({"group_size": 0}, "group_size 0"),
    "codes dtype": ({"codes": torch.zeros(3, 10, dtype=torch.int32)}, "int32"),
    "codes rank": ({"codes": torch.zeros(30, dtype=torch.uint8)}, r"\[30\]"),
    "no codes": ({"codes": torch.zeros(0, 10, dtype=torch.uint8)}, r"\[0, 10\]"),
    "code too large": ({"codes": torch.full((3, 10), 8, dtype=torch.uint8)}, "a code of 8"),
    "scale shape": ({"scale": torch.ones(3, 2, dtype=torch.float64)}, r"scale is .*\[3, 2\]"),
    "scale dtype": ({"scale": torch.ones(3, 3, dtype=torch.int64)}, "scale is torch.int64"),
    "offset shape": ({"offset": torch.ones(3, 4, dtype=torch.float64)}, r"offset is .*\[3, 4\]"),
    "offset NaN": ({"offset": torch.full((3, 3), float("nan"), dtype=torch.float64)}, "offset"),
    "scale inf": ({"scale": torch.full((3, 3), float("inf"), dtype=torch.float64)}, "scale"),
    "mixed dtypes": ({"offset": torch.zeros(3, 3)}, "differ in dtype"),
}


@pytest.mark.parametrize("kind", BREAKAGE)
def test_validate_catches(kind: str) -> None:
    changes, message = BREAKAGE[kind]
    broken = dataclasses.replace(make_affine(3, 10, 3, 4), **changes)  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match=message):
        broken.validate()

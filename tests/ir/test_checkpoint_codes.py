"""Codes are found by the float rows that they stand for, whatever was done to the rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.ir.affine import GroupAffine, group_count
from qalora_compile.ir.checkpoint_codes import CheckpointCodes, CheckpointWeight


def random_affine(n: int, k: int, group: int, bits: int, seed: int) -> GroupAffine:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale, offset = torch.randn(2, n, group_count(k, group), generator=generator)
    return GroupAffine(codes, scale, offset, bits, group)


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 20),
    group=st.integers(1, 24),
    bits=st.sampled_from((2, 3, 4, 8)),
    seed=st.integers(0, 99),
)
def test_rows_are_found_in_any_order_and_from_several_tensors(
    n: int, k: int, group: int, bits: int, seed: int
) -> None:
    pair = [random_affine(n, k, group, bits, seed + at) for at in (0, 100)]
    codes = CheckpointCodes()
    for affine in pair:
        codes.add(CheckpointWeight(affine, "form"))
    rows = torch.cat([affine.dequantize() for affine in pair])
    rows = rows[torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))]
    found = codes.find(rows)
    assert found is not None
    assert torch.equal(found.affine.dequantize(), rows)
    assert (found.affine.bits, found.affine.group_size) == (bits, group)
    assert codes.find(rows.t().contiguous()) is None or n * 2 == k or n == k == 1


def test_a_row_that_is_not_stored_is_not_found() -> None:
    affine = random_affine(5, 16, 8, 4, 0)
    codes = CheckpointCodes()
    codes.add(CheckpointWeight(affine, "form"))
    changed = affine.dequantize()
    changed[3, 7] = torch.nextafter(changed[3, 7], torch.tensor(9.0))
    assert codes.find(changed) is None
    assert codes.find(affine.dequantize().double()) is None
    assert codes.find(affine.dequantize()) is not None


def test_rows_of_unlike_forms_make_no_matrix() -> None:
    codes = CheckpointCodes()
    parts = [random_affine(2, 16, 8, bits, 0) for bits in (3, 4)]
    for affine in parts:
        codes.add(CheckpointWeight(affine, f"{affine.bits} bits"))
    assert codes.find(torch.cat([affine.dequantize() for affine in parts])) is None


def test_zeros_of_both_signs_are_one_value() -> None:
    affine = GroupAffine(
        torch.tensor([[8, 3]], dtype=torch.uint8), -torch.ones(1, 1), torch.full((1, 1), 8.0), 4, 2
    )
    codes = CheckpointCodes()
    codes.add(CheckpointWeight(affine, "Q4_0"))
    found = codes.find(torch.tensor([[-0.0, 5.0]]))
    assert found is not None
    assert torch.equal(found.affine.codes, affine.codes)
    assert found.affine.dequantize().tolist() == [[0.0, 5.0]]

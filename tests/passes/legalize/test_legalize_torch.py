"""legalize-torch: layouts, padding and the bound of the one rounding."""

from __future__ import annotations

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError
from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.ops.int4_kernels import Int4packLinear
from qalora_compile.ir.spec import INT4PACK_LINEAR
from qalora_compile.passes.framework.pipeline import Pipeline
from tests.models import OneLinear, adapted, assert_close

LOWER = Pipeline.parse("legalize-torch")


def folded(k: int, n: int, bits: int = 4, group: int = 32) -> qc.Program:
    spec = qc.QuantSpec(bits=bits, group_size=group)
    return qc.fold_adapters(adapted(OneLinear(k, n).eval(), (torch.randn(3, k),), spec))


@pytest.mark.parametrize(
    ("k", "n", "group", "kernel_group", "stored"),
    [
        (64, 16, 32, 32, (16, 32)),
        (512, 16, 512, 256, (16, 256)),
        (384, 16, 96, 32, (16, 192)),
        (384, 32, 192, 64, (32, 192)),
        (64, 10, 16, 32, (16, 64)),
        (50, 33, 32, 32, (48, 32)),
    ],
)
def test_groups_and_rows_fit_the_kernel(
    k: int, n: int, group: int, kernel_group: int, stored: tuple[int, int]
) -> None:
    program = folded(k, n, group=group)
    lowered = LOWER(program).program
    (node,) = (node for node in lowered.graph.nodes if node.target is INT4PACK_LINEAR)
    call = Int4packLinear.of(node)
    tensors = lowered.tensors()
    assert (call.group_size, call.n) == (kernel_group, n)
    assert tuple(tensors[str(call.packed.target)].shape) == stored
    x = torch.randn(5, k)
    assert_close(lowered(x), program(x), relative=1e-5)


def test_a_weight_moves_by_the_rounding_of_zero_alone() -> None:
    program = folded(64, 16)
    before, after = program.tensors(), LOWER(program).program.tensors()
    path = next(n for n in before if n.endswith(".qweight")).removesuffix(".qweight")
    scale, offset = (before[f"{path}.{name}"].double() for name in ("scale", "offset"))
    pair = after[f"{path}.scale_and_zero"].double().permute(2, 1, 0)
    assert torch.equal(pair[0], scale), "the scale is kept"
    moved = (pair[1] - (offset + 8 * scale)).abs()
    assert bool((moved <= 2.0**-24 * pair[1].abs()).all())
    identity = torch.eye(64)
    weight = dequantize(before[f"{path}.qweight"], scale, offset, bits=4, group_size=32, k=64)
    bias = before.get(f"{path}.bias", torch.zeros(16))
    found = LOWER(program).program(identity).double() - bias.double()
    assert_close(found.t(), weight, relative=1e-6)


def test_what_the_kernel_does_not_hold_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="8 bits is not split into planes"):
        LOWER(folded(64, 16, bits=8))
    half = adapted(OneLinear(64, 16).eval().half(), (torch.randn(3, 64).half(),))
    with pytest.raises(PreconditionError, match="run widen-halves|computes in float16"):
        LOWER(qc.fold_adapters(half))


def test_rows_are_reported() -> None:
    result = LOWER.passes[0](folded(50, 10, bits=3, group=16))
    (change,) = result.changes
    assert "groups of 32" in change.what
    for part in ("3 bits stored in 4", "groups of 16 padded to 32", "10 rows padded"):
        assert part in change.why

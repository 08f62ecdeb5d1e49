"""ATen's operators mean what torch computes, at small shapes, before and in normal form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile.ir.ops.transformer_fusions  # noqa: F401, registers operators
from qalora_compile.verify.proof.symbolic.expression import leaf, truth
from qalora_compile.verify.proof.symbolic.fx_operators import ATEN
from qalora_compile.verify.proof.symbolic.polynomial import as_poly, size
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError
from tests.verify.proof.symbolic.numbers import Numbers, array

SIZES = {"b": 2, "s": 3, "p": 2}
CASES: dict[str, tuple[str, list[tuple[Any, ...]], list[Any], dict[str, Any]]] = {
    "attention": (
        "aten.scaled_dot_product_attention.default",
        [("b", 4, "s", 4), ("b", 2, "s", 4), ("b", 2, "s", 2), ("b", 1, "s", "s", bool)],
        [],
        {"scale": 0.7, "enable_gqa": True},
    ),
    "causal attention": (
        "aten.scaled_dot_product_attention.default",
        [("b", 2, "s", 4), ("b", 2, "s", 4), ("b", 2, "s", 4)],
        [None, 0.0, True],
        {},
    ),
    "attention with a past": (
        "qalora.attention.default",
        [
            *[("b", "s", 8), ("b", "s", 4), ("b", "s", 4), ("b", 1, "s", 5)],
            *[("b", 2, "p", 2), ("b", 2, "p", 2)],
        ],
        [4, 2, 0.3],
        {},
    ),
    "rotary": (
        "qalora.rotary_embedding.default",
        [("b", "s", 12), ("b", "s", 2), ("b", "s", 2)],
        [2],
        {},
    ),
    "view": ("aten.view.default", [("b", "s", 12)], [[2, 3, -1, 4]], {}),
    "flatten": ("aten.flatten.using_ints", [("b", "s", 4)], [0, 1], {}),
    "transpose": ("aten.transpose.int", [("b", "s", 4)], [1, -1], {}),
    "slice": ("aten.slice.Tensor", [("b", 6)], [1, 1, 5, 2], {}),
    "slice from the end": ("aten.slice.Tensor", [("b", "s", 6)], [-1, -2, 9223372036854775807], {}),
    "cat": ("aten.cat.default", [("b", "s"), ("b", "p")], [-1], {}),
    "softmax": ("aten.softmax.int", [("b", "s")], [-1], {}),
    "mean": ("aten.mean.dim", [("b", "s", 4)], [[-1], True], {}),
    "sum": ("aten.sum.dim_IntList", [("b", "s", 4)], [[1]], {}),
    "layer norm": ("aten.layer_norm.default", [("b", "s", 4), (4,), (4,)], [], {}),
    "rms norm": ("qalora.rms_norm.default", [("b", "s", 4), (4,)], [1e-3], {}),
    "mean of two axes": ("aten.mean.dim", [("b", "s", 4)], [[0, -1]], {}),
    "sums up to each place": ("aten.cumsum.default", [("b", "s", 4)], [1], {}),
    "differences": ("aten.diff.default", [("b", "s"), ("b", 1)], [], {}),
    "gelu": ("aten.gelu.default", [("b", "s")], [], {}),
    "gelu by tanh": ("aten.gelu.default", [("b", "s")], [], {"approximate": "tanh"}),
    "addmm": ("aten.addmm.default", [(3,), ("b", 4), (4, 3)], [], {}),
    "linear": ("aten.linear.default", [("b", 4), (3, 4), (3,)], [], {}),
    "parts": ("aten.unbind.int", [("b", 3, "s")], [1], {}),
    "repeated": ("aten.repeat_interleave.self_int", [("b", "s", 4)], [2, -1], {}),
    "one value": ("aten.full_like.default", [("b", "s")], [7], {}),
    "smaller": ("aten.minimum.default", [("b", "s"), ("s",)], [], {}),
    "larger": ("aten.maximum.default", [("b", "s"), ("s",)], [], {}),
    "between": ("aten.clamp.default", [("b", "s")], [-0.5, 0.5], {}),
    "not below": ("aten.clamp.default", [("b", "s")], [0.25], {}),
    "size": ("aten.abs.default", [("b", "s")], [], {}),
    "silu": ("aten.silu.default", [("b", "s")], [], {}),
    "power": ("aten.pow.Tensor_Scalar", [("b", "s")], [2], {}),
    "difference": ("aten.sub.Tensor", [("b", "s"), ("s",)], [], {}),
    "comparison": ("aten.lt.Tensor", [("b", "s"), ("b", "s")], [], {}),
    "choice": ("aten.where.self", [("b", "s", bool), ("b", "s"), ("s",)], [], {}),
}


def given(shape: tuple[Any, ...], name: str) -> tuple[Tensor, torch.Tensor]:
    """A symbolic tensor and numbers for it."""
    boolean = shape[-1] is bool
    axes = shape[:-1] if boolean else shape
    real = torch.randn([SIZES.get(axis, axis) for axis in axes])
    if boolean:
        real = real > 0
        real[..., 0] = True

    def element(index: Any) -> Any:
        found = leaf(name, index)
        return truth(found) if boolean else found

    sizes = tuple(size(axis) if isinstance(axis, str) else as_poly(axis) for axis in axes)
    return Tensor(sizes, "bool" if boolean else "float32", element), real


def arguments(name: str, tensors: list[Any], rest: list[Any], *, fixed: bool) -> list[Any]:
    """The operands of a case; `cat` takes its tensors as one of them."""
    if name == "cat":
        return [tensors, *rest]
    if name == "differences":
        return [tensors[0], 1, -1, tensors[1]]
    if name == "layer norm":
        return [tensors[0], [4], *tensors[1:], *rest]
    if name == "view" and not fixed:
        return [*tensors, [*map(as_size, ("b", "s")), -1, 4]]
    return [*tensors, *rest]


def as_size(name: str) -> Tensor:
    """The size of an axis as a value of the graph."""
    from qalora_compile.verify.proof.symbolic.expression import integer

    return Tensor((), "int64", lambda _: integer(size(name)))


def torch_operator(op: str) -> Callable[..., Any]:
    """The operator itself."""
    library, name, overload = op.split(".")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, library), name), overload)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("normal", [False, True], ids=["as it is", "normal form"])
def test_each_operator_means_what_torch_computes(name: str, normal: bool) -> None:
    torch.manual_seed(len(name))
    op, shapes, rest, options = CASES[name]
    pairs = [given(shape, f"x{i}") for i, shape in enumerate(shapes)]
    if name == "attention with a past":
        pairs[3] = sized(pairs[3])
    wanted = torch_operator(op)(
        *arguments(name, [real for _, real in pairs], rest, fixed=True), **options
    )
    value = ATEN.value(op, arguments(name, [x for x, _ in pairs], rest, fixed=False), options)
    leaves = {f"x{i}": real.numpy() for i, (_, real) in enumerate(pairs)}
    atoms = {atom: SIZES[n] for n in SIZES for atom in size(n).atoms}
    found = value if isinstance(value, tuple) else (value,)
    for one, other in zip(found, wanted if isinstance(value, tuple) else (wanted,), strict=True):
        numbers = array(one, Numbers(leaves, atoms), normal=normal)
        np.testing.assert_allclose(numbers, other.double().numpy(), atol=2e-6)


def sized(pair: tuple[Tensor, torch.Tensor]) -> tuple[Tensor, torch.Tensor]:
    """A mask over past and present positions."""
    value, real = pair
    shape = (*value.shape[:3], size("p") + size("s"))
    return Tensor(shape, value.dtype, lambda index: value[index]), real


def test_an_option_without_meaning_is_refused() -> None:
    x, _ = given(("b", "s"), "x")
    with pytest.raises(UnprovableError, match="alpha"):
        ATEN.value("aten.add.Tensor", [x, x], {"alpha": 2})
    with pytest.raises(UnprovableError, match="its option approximate is not known"):
        ATEN.value("aten.silu.default", [x], {"approximate": "tanh"})
    with pytest.raises(UnprovableError, match="it has no symbolic form"):
        ATEN.value("aten.grid_sampler.default", [x], {})
    with pytest.raises(UnprovableError, match="are not known to be equal"):
        ATEN.value("aten.add.Tensor", [x, given(("s", "b"), "y")[0]], {})


def test_wrapped_indices_and_unknown_bounds_are_refused() -> None:
    x, _ = given(("b", "s"), "x")
    with pytest.raises(UnprovableError, match="is not known to be from 0"):
        ATEN.value("aten.slice.Tensor", [x, 1, 0, 4], {})
    with pytest.raises(UnprovableError, match="a cast to float16"):
        ATEN.value("aten.to.dtype", [x, "float16"], {})

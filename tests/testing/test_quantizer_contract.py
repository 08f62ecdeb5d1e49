"""Every method of quantization keeps its contract, and a quantizer that breaks it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qalora_compile import extend
from qalora_compile.config import METHODS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.minmax import quantize_minmax
from qalora_compile.registry import QUANTIZERS
from qalora_compile.testing import ContractError, check_quantizer


@pytest.mark.parametrize("name", QUANTIZERS.builtin)
def test_every_method_keeps_the_contract(name: str) -> None:
    assert name in METHODS
    check_quantizer(name, bits=(2, 4) if name != "minmax" else (2, 3, 4, 8))


def planted(change: Callable[[Tensor, GroupAffine], GroupAffine]) -> extend.Method:
    """Min-max, whose result is changed."""

    def quantize(
        weight: Tensor, spec: QuantSpec, statistics: extend.ActivationStatistics | None
    ) -> extend.QuantizedWeight:
        return extend.QuantizedWeight(change(weight, quantize_minmax(weight, spec)))

    return extend.Method(quantize=quantize)


def shaken(weight: Tensor, affine: GroupAffine) -> GroupAffine:
    noise = torch.rand_like(affine.offset) * affine.scale.abs() * 1e-3
    return dataclasses.replace(affine, offset=affine.offset + noise)


def spoiled(weight: Tensor, affine: GroupAffine) -> GroupAffine:
    weight.zero_()
    return affine


def repaired(weight: Tensor, affine: GroupAffine) -> GroupAffine:
    """Hides what is not finite."""
    scale, offset = (torch.nan_to_num(v, 0.0, 1.0, 1.0) for v in (affine.scale, affine.offset))
    return dataclasses.replace(affine, scale=scale, offset=offset)


def eager(weight: Tensor, affine: GroupAffine) -> GroupAffine:
    """Looks at values, which a deferred weight has not."""
    float(weight.sum())
    return affine


FAULTS: dict[str, tuple[Callable[[Tensor, GroupAffine], GroupAffine], str]] = {
    "codes too wide": (lambda w, a: dataclasses.replace(a, codes=a.codes + 250), "form"),
    "a dropped group": (lambda w, a: dataclasses.replace(a, scale=a.scale[:, :-1]), "form"),
    "other bits": (lambda w, a: dataclasses.replace(a, bits=8), "form: bits and group size"),
    "narrow parameters": (
        lambda w, a: dataclasses.replace(a, scale=a.scale.float(), offset=a.offset.float()),
        "precision",
    ),
    "random": (shaken, "determinism"),
    "an edited weight": (spoiled, "determinism|purity"),
    "a step off": (
        lambda w, a: dataclasses.replace(a, offset=a.offset + a.scale),
        "error: no weight moves",
    ),
    "NaN repaired": (repaired, "refusal"),
    "values asked for": (eager, "laziness"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_quantizer_that_breaks_a_clause_is_named(fault: str) -> None:
    change, clause = FAULTS[fault]
    with extend.scoped():
        extend.register_quantizer("planted", planted(change))
        with pytest.raises(ContractError, match=f"the quantizer planted.*\n  clause: ({clause})"):
            check_quantizer("planted", bits=(4,))


def test_a_quantizer_that_does_without_the_data_it_needs_is_named() -> None:
    with extend.scoped():
        method = dataclasses.replace(planted(lambda w, a: a), needs_data=True)
        extend.register_quantizer("planted", method)
        with pytest.raises(ContractError, match="refusal: missing statistics"):
            check_quantizer("planted", bits=(4,))


def test_a_larger_error_can_be_stated() -> None:
    method = planted(lambda w, a: dataclasses.replace(a, offset=a.offset + a.scale))
    with extend.scoped():
        extend.register_quantizer("planted", dataclasses.replace(method, max_error=0.6))
        check_quantizer("planted", bits=(2, 4))


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ContractError, match="clause: specification.*\n  found:  UserInputError"):
        check_quantizer("nobodys")
    with pytest.raises(UserInputError, match="method is 'nobodys'"):
        QuantSpec(method="nobodys")

"""Quantizers by name, and one weight quantized by one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from qalora_compile.config import CALIBRATED, METHODS, QuantSpec
from qalora_compile.errors import InternalError, UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.lazy_tensor import is_lazy
from qalora_compile.quantizers.base import QuantizedWeight, Quantizer
from qalora_compile.quantizers.minmax import quantize_integer_zero
from qalora_compile.quantizers.refine import refine_offset
from qalora_compile.quantizers.report import QuantReport, announce_report, measure_sqnr
from qalora_compile.quantizers.statistics import ActivationStatistics

_Spec = TypeVar("_Spec", bound=QuantSpec)


_WITHOUT_DATA = "hqq"
"""The method for a weight without statistics, where the one asked for needs them."""


def get_quantizer(method: str) -> Quantizer:
    """The quantizer of `QuantSpec.method`."""
    from qalora_compile.quantizers.gptq import quantize_gptq
    from qalora_compile.quantizers.hqq import quantize_hqq
    from qalora_compile.quantizers.mse import quantize_mse

    methods: dict[str, Quantizer] = {
        "minmax": _without_data(_by_range),
        "mse": _without_data(quantize_mse),
        "hqq": quantize_hqq,
        "gptq": _with_data(quantize_gptq),
    }
    if method not in methods:
        raise InternalError(f"the method {method!r} is configurable but has no quantizer")
    return methods[method]


def _by_range(weight: Tensor, spec: QuantSpec) -> GroupAffine:
    """Levels between the smallest and the largest weight of a group; 0 among them, where asked."""
    from qalora_compile.quantizers.minmax import quantize_minmax

    if spec.zero_point == "integer":
        return quantize_integer_zero(weight, spec.width, spec.group)
    return quantize_minmax(weight, spec)


def _without_data(choose: Callable[[Tensor, QuantSpec], GroupAffine]) -> Quantizer:
    def quantize(
        weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
    ) -> QuantizedWeight:
        return QuantizedWeight(choose(weight, spec))

    return quantize


def _with_data(
    choose: Callable[[Tensor, QuantSpec, ActivationStatistics], QuantizedWeight],
) -> Quantizer:
    def quantize(
        weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
    ) -> QuantizedWeight:
        if statistics is None:
            raise data_needed(spec.method)
        return choose(weight, spec, statistics)

    return quantize


def without_data(spec: _Spec) -> _Spec:
    """The same specification, with a method that needs no data."""
    return replace(spec, method=_WITHOUT_DATA) if spec.method in CALIBRATED else spec


def as_stored(affine: GroupAffine) -> Quantizer:
    """A quantizer that chooses nothing: it gives the codes that a weight has already."""

    def quantize(
        weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
    ) -> QuantizedWeight:
        return QuantizedWeight(affine)

    return quantize


def data_needed(method: str) -> UserInputError:
    """The error where there are no calibration data for a method that needs them."""
    return UserInputError(
        f"the method {method} needs calibration data",
        hint="give calibration=[(x,), …] (finetune --calibration FILE); these methods need none: "
        f"{', '.join(name for name in METHODS if name not in CALIBRATED)}",
    )


def quantize_weight(
    quantizer: Quantizer,
    weight: Tensor,
    spec: QuantSpec,
    *,
    path: str,
    statistics: ActivationStatistics | None = None,
    method: str | None = None,
) -> QuantizedWeight:
    """Quantize a weight, refine its offsets where the specification asks for it, and report.

    Args:
        quantizer: See `get_quantizer`.
        weight: `[N, K]`; where it is deferred nothing is measured yet.
        spec: Method, bits, group size.
        path: Of the site, for the report.
        statistics: Of the layer's input.
        method: What the report calls the quantizer; None takes the specification's.

    Raises:
        UserInputError: the quantizer refuses its input, or gives an illegal result.
    """
    started = time.perf_counter()
    try:
        chosen = quantizer(weight, spec, statistics)
        affine, notes = chosen.affine.validate(), chosen.notes
        if statistics is not None and spec.refine_offsets and spec.zero_point == "real":
            affine, more = refine_offset(weight, affine, statistics)
            affine, notes = affine.validate(), (*notes, *more)
    except UserInputError as error:
        error.where = error.where or path
        raise
    spent = time.perf_counter() - started

    def report() -> QuantReport:
        weight_db, output_db = measure_sqnr(weight, affine, statistics)
        return QuantReport(
            path=path,
            method=method or spec.method,
            bits=spec.width,
            group_size=spec.group,
            weights=weight.numel(),
            weight_sqnr_db=weight_db,
            output_sqnr_db=output_db,
            rows=None if statistics is None else statistics.rows,
            seconds=spent,
            notes=notes,
        )

    if not is_lazy(weight):
        announce_report(report)
    return QuantizedWeight(affine, notes)

"""The registry of quantizers by name, and the quantization of one weight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from qalora_compile.config import METHODS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.lazy_tensor import is_lazy
from qalora_compile.quantizers.base import Method, QuantizedWeight, Quantizer
from qalora_compile.quantizers.gptq import quantize_gptq
from qalora_compile.quantizers.hqq import quantize_hqq
from qalora_compile.quantizers.minmax import quantize_integer_zero, quantize_minmax
from qalora_compile.quantizers.mse import quantize_mse
from qalora_compile.quantizers.refine import refine_offset
from qalora_compile.quantizers.report import QuantReport, announce_report, measure_sqnr
from qalora_compile.quantizers.statistics import ActivationStatistics
from qalora_compile.registry import QUANTIZERS

_Spec = TypeVar("_Spec", bound=QuantSpec)


_WITHOUT_DATA = "hqq"
"""The method for a weight without statistics if the requested one needs them."""


def register_quantizer(name: str, method: Method) -> None:
    """Register a method under a name, as a value of `QuantSpec.method`.

    Raises:
        ExtensionError: the name is taken, or `method` is not a `Method`.
    """
    QUANTIZERS.add(name, _checked(name, method))


def get_method(name: str) -> Method:
    """The method with a name that `QuantSpec` accepts.

    Raises:
        ExtensionError: its package cannot be imported, or provides something else.
    """
    return _checked(name, QUANTIZERS.load(name))


def _checked(name: str, found: object) -> Method:
    if not isinstance(found, Method):
        raise QUANTIZERS.unfit(name, "a Method")
    return found


def get_quantizer(method: str) -> Quantizer:
    """The quantizer of `QuantSpec.method`."""
    return get_method(method).quantize


def needs_data(method: str) -> bool:
    """Whether a method needs calibration data."""
    return get_method(method).needs_data


def _by_range(weight: Tensor, spec: QuantSpec) -> GroupAffine:
    """Levels between a group's smallest and largest weight, including 0 if requested."""
    if spec.zero_point == "integer":
        return quantize_integer_zero(weight, spec.width, spec.group)
    return quantize_minmax(weight, spec)


def _without_data(choose: Callable[[Tensor, QuantSpec], GroupAffine]) -> Quantizer:
    def quantize(
        weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
    ) -> QuantizedWeight:
        return QuantizedWeight(choose(weight, spec))

    return quantize


def _by_data(
    weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
) -> QuantizedWeight:
    """`quantize_gptq`, which needs statistics."""
    if statistics is None:
        raise data_needed(spec.method)
    return quantize_gptq(weight, spec, statistics)


MINMAX = Method(quantize=_without_data(_by_range))
MSE = Method(quantize=_without_data(quantize_mse), max_error=0.5)
HQQ = Method(quantize=quantize_hqq, max_error=1.0)
GPTQ = Method(quantize=_by_data, needs_data=True, max_error=2.0)


def without_data(spec: _Spec) -> _Spec:
    """The same specification, with a method that needs no data."""
    return replace(spec, method=_WITHOUT_DATA) if needs_data(spec.method) else spec


def as_stored(affine: GroupAffine) -> Quantizer:
    """A quantizer that returns the existing codes of a weight."""

    def quantize(
        weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
    ) -> QuantizedWeight:
        return QuantizedWeight(affine)

    return quantize


def data_needed(method: str) -> UserInputError:
    """The error for a method that needs calibration data and has none."""
    return UserInputError(
        f"the method {method} needs calibration data",
        hint="give calibration=[(x,), …] (finetune --calibration FILE); these methods need none: "
        f"{', '.join(name for name in METHODS if not needs_data(name))}",
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
    """Quantize a weight, refine its offsets if the specification asks for it, and report.

    Args:
        quantizer: The quantizer of a method, or `as_stored`.
        weight: `[N, K]`; a lazy tensor is not measured yet.
        spec: Method, bits, group size.
        path: Path of the site, for the report.
        statistics: Statistics of the layer's input.
        method: The quantizer's name in the report; None takes the specification's.

    Raises:
        UserInputError: the quantizer refuses its input, or returns an invalid result.
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

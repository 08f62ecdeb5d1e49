"""How wide the codes of each weight should be, within a budget, by what the model loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.packing import packed_width
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.passes.assign_bits import AssignBits
from qalora_compile.passes.choices import format_choices
from qalora_compile.passes.corrections import float_weights
from qalora_compile.progress import track
from qalora_compile.quantizers.budget import Choice, choose_within
from qalora_compile.quantizers.calibrate import collect_statistics
from qalora_compile.quantizers.minmax import quantize_minmax
from qalora_compile.quantizers.refine import refine_offset
from qalora_compile.quantizers.sensitivity import Sensitivity, measure_sensitivities
from qalora_compile.quantizers.statistics import ActivationStatistics


def choose_bits(
    annotated: Program, spec: QuantSpec, calls: Iterable[Call]
) -> tuple[AssignBits, dict[str, str]]:
    """The pass that spends the budget of `spec` best, and why, by path.

    What a weight loses at a width is the expected squared change of the model's outputs on the
    calls: the error of the layer's output, measured with min-max codes (and refined offsets, if
    `spec` asks for them), times how much the outputs
    move when that does (`measure_sensitivities`). The losses are taken to add up, and the sum is
    made as small as the budget allows (`choose_within`).

    Args:
        annotated: The program to quantize.
        spec: With bits `"auto"`.
        calls: Arguments of a few typical calls.

    Raises:
        UserInputError: two bits everywhere are beyond the budget, or a call does not fit.
        PreconditionError: a weight has no values yet.
    """
    calls, sites = list(calls), annotated.plan.weights_to_quantize()
    budget = _budget(sites, spec)
    weights = float_weights(annotated)
    statistics = collect_statistics(annotated, calls)
    sensitivities = measure_sensitivities(annotated, calls)
    measured = [
        _losses(weights[s.path], spec, statistics.get(s.path), sensitivities[s.path])
        for s in track(sites, "measure")
    ]
    items = [
        [
            Choice(_cost(site, bits, spec), loss)
            for bits, loss in zip(SUPPORTED_BITS, losses, strict=True)
        ]
        for site, losses in zip(sites, measured, strict=True)
    ]
    chosen = choose_within(items, budget)
    total = sum(item[way].loss for item, way in zip(items, chosen, strict=True))
    reasons = {
        site.path: _why(item, way, total)
        for site, item, way in zip(sites, items, chosen, strict=True)
    }
    choices = {
        site.path: f"{SUPPORTED_BITS[way]}/{spec.group_size}"
        for site, way in zip(sites, chosen, strict=True)
    }
    return AssignBits(choices=format_choices(choices)), reasons


def _losses(
    weight: Tensor,
    spec: QuantSpec,
    statistics: ActivationStatistics | None,
    sensitivity: Sensitivity,
) -> list[float]:
    """What a weight loses at each width."""
    matrices = weight.reshape(-1, *weight.shape[-2:])
    found = []
    for bits in SUPPORTED_BITS:
        width = QuantSpec(bits=bits, group_size=spec.group_size)
        made = [quantize_minmax(part, width) for part in matrices]
        if statistics is not None and spec.refine_offsets:
            made = [refine_offset(matrices[0], made[0], statistics)]
        changes = [
            w.double() - affine.dequantize() for w, affine in zip(matrices, made, strict=True)
        ]
        if statistics is not None:
            error = statistics.output_error(changes[0])
        else:  # experts: their inputs count alike
            power = sensitivity.power / max(sensitivity.inputs, 1)
            error = power * sum(float(change.square().sum()) for change in changes) / len(changes)
        found.append(sensitivity.gain * error)
    return found


def _cost(site: Site, bits: int, spec: QuantSpec) -> int:
    """Bits of the codes, or bytes of codes, scale and offset."""
    rows = (site.experts or 1) * site.n
    if spec.budget_unit == "bits":
        return rows * site.k * bits
    width = 8 if site.dtype == "float64" else 4
    return rows * (packed_width(site.k, bits) + 2 * width * group_count(site.k, spec.group_size))


def _budget(sites: Iterable[Site], spec: QuantSpec) -> int:
    """The budget in the unit of `_cost`.

    Raises:
        UserInputError: it is less than the narrowest codes take.
    """
    assert spec.budget is not None, "checked with the specification"
    sites, narrowest = list(sites), min(SUPPORTED_BITS)
    one = 10**6
    if spec.budget_unit == "bits":
        one = sum((site.experts or 1) * site.n * site.k for site in sites)
    least = sum(_cost(site, narrowest, spec) for site in sites)
    if spec.budget * one < least:
        raise UserInputError(
            f"a budget of {spec.budget:g} {spec.budget_unit} is less than {narrowest} bits for "
            f"every weight take, in groups of {spec.group_size}",
            hint=f"the least is {math.ceil(least / one * 1e4) / 1e4:g} {spec.budget_unit}",
        )
    return int(spec.budget * one)


def _why(item: Sequence[Choice], way: int, total: float) -> str:
    """What part of the whole loss is a weight's, and what it would be with narrower codes."""
    shares = [choice.loss / total if total > 0 else 0.0 for choice in item]
    narrower = f", {SUPPORTED_BITS[way - 1]} bits {shares[way - 1]:.1e}" if way else ""
    return f"{SUPPORTED_BITS[way]} bits make {shares[way]:.1e} of the loss{narrower}"

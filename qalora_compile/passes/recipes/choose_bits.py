"""Choice of the width and group size of each weight's codes within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import Tensor

from qalora_compile.config import AUTO, AUTO_GROUPS, SUPPORTED_BITS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.packing.bitstream import packed_width
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.ir.site_plan import Site
from qalora_compile.passes.analysis.select_sites import format_choices
from qalora_compile.passes.assign_bits import AssignBits
from qalora_compile.passes.recipes.lora_init import float_weights
from qalora_compile.progress import track
from qalora_compile.quantizers.bounded_statistics import StatisticsInParts
from qalora_compile.quantizers.budget import Choice, choose_within
from qalora_compile.quantizers.calibrate import as_calls
from qalora_compile.quantizers.refine import refine_offset
from qalora_compile.quantizers.registry import get_quantizer, without_data
from qalora_compile.quantizers.sensitivity import Sensitivity, measure_sensitivities
from qalora_compile.quantizers.statistics import ActivationStatistics

_PARTS = 10**4
"""A hint names the least budget as a decimal number, rounded up to this many parts of one."""


def choose_bits(
    annotated: Program, spec: QuantSpec, calls: Iterable[Call]
) -> tuple[AssignBits, dict[str, str]]:
    """The pass that spends the budget of `spec` best, and why, by path.

    A form is a width with a group size. The loss of a weight in a form is the expected squared
    change of the model's outputs on the calls: the error of the layer's output, measured with the
    codes that the method of `spec` gives (with refined offsets, if it asks for them), times the
    sensitivity of the outputs to it (`measure_sensitivities`). The losses are assumed to add up,
    and `choose_within` minimizes their sum within the budget. Without layers nothing is chosen.

    Args:
        annotated: The program to quantize.
        spec: With bits `"auto"`.
        calls: Arguments of a few typical calls.

    Raises:
        UserInputError: the budget is below the cheapest forms, or a call does not fit.
        PreconditionError: a weight has no values yet.
    """
    calls, sites = as_calls(calls), annotated.plan.weights_to_quantize()
    if not sites:
        return AssignBits(), {}
    forms, budget = _forms(spec), _budget(sites, spec)
    weights = float_weights(annotated)
    statistics = StatisticsInParts(annotated, calls)
    sensitivities = measure_sensitivities(annotated, calls)
    measured = [
        _losses(weights[s.path], forms, statistics.get(s.path), sensitivities[s.path])
        for s in track(sites, "measure")
    ]
    items = [
        [Choice(_cost(site, form, spec), loss) for form, loss in zip(forms, losses, strict=True)]
        for site, losses in zip(sites, measured, strict=True)
    ]
    chosen = choose_within(items, budget)
    total = sum(item[index].loss for item, index in zip(items, chosen, strict=True))
    reasons = {
        site.path: _why(forms, item, index, total)
        for site, item, index in zip(sites, items, chosen, strict=True)
    }
    choices = {
        site.path: f"{forms[index].width}/{forms[index].group}"
        for site, index in zip(sites, chosen, strict=True)
    }
    return AssignBits(choices=format_choices(choices)), reasons


def _forms(spec: QuantSpec) -> list[QuantSpec]:
    """The forms, as specifications, that every weight can be quantized to."""
    groups = AUTO_GROUPS if spec.group_size == AUTO else (spec.group,)
    return [
        replace(
            spec,
            bits=bits,
            group_size=group,
            budget=None,
            budget_unit=QuantSpec.budget_unit,
            refine_offsets=spec.refine_offsets and spec.zero_point == "real",
        )
        for bits in SUPPORTED_BITS
        for group in groups
    ]


def _losses(
    weight: Tensor,
    forms: Sequence[QuantSpec],
    statistics: ActivationStatistics | None,
    sensitivity: Sensitivity,
) -> list[float]:
    """The loss of a weight in each form."""
    matrices = weight.reshape(-1, *weight.shape[-2:])
    found = []
    for form in forms if statistics is not None else map(without_data, forms):
        quantizer = get_quantizer(form.method)
        made = [quantizer(part, form, statistics).affine for part in matrices]
        if statistics is not None and form.refine_offsets:
            made = [refine_offset(matrices[0], made[0], statistics)[0]]
        changes = [
            w.double() - affine.dequantize() for w, affine in zip(matrices, made, strict=True)
        ]
        if statistics is not None:
            error = statistics.output_error(changes[0])
        else:  # experts: all inputs have equal weight
            power = sensitivity.power / max(sensitivity.inputs, 1)
            error = power * sum(float(change.square().sum()) for change in changes) / len(changes)
        found.append(sensitivity.gain * error)
    return found


def _cost(site: Site, form: QuantSpec, spec: QuantSpec) -> int:
    """The cost of a weight: bits of its codes, bits or bytes of all that is stored."""
    rows = (site.experts or 1) * site.n
    if spec.budget_unit == "bits":
        return rows * site.k * form.width
    width = 8 if site.dtype == "float64" else 4
    row = packed_width(site.k, form.width) + 2 * width * group_count(site.k, form.group)
    return rows * row * (8 if spec.budget_unit == "stored-bits" else 1)


def _budget(sites: Iterable[Site], spec: QuantSpec) -> int:
    """The budget in the unit of `_cost`.

    Raises:
        UserInputError: it is less than the cheapest codes take.
    """
    assert spec.budget is not None, "checked with the specification"
    sites, forms = list(sites), _forms(spec)
    one = 10**6
    if spec.budget_unit != "megabytes":
        one = sum((site.experts or 1) * site.n * site.k for site in sites)
    least = sum(min(_cost(site, form, spec) for form in forms) for site in sites)
    # the decimal number as given, not its double, so that the least budget in a hint is accepted
    budget = Fraction(repr(float(spec.budget))) * one
    if budget < least:
        nearest = math.ceil(Fraction(least, one) * _PARTS) / _PARTS
        raise UserInputError(
            f"a budget of {spec.budget:.15g} {spec.budget_unit} is less than {forms[0].bits} bits "
            f"for every weight take, in groups of {max(form.group for form in forms)}",
            hint=f"the least is {nearest:.15g} {spec.budget_unit}",
        )
    return int(budget)


def _why(forms: Sequence[QuantSpec], item: Sequence[Choice], index: int, total: float) -> str:
    """A weight's share of the total loss, and what it would be in the next cheaper form."""
    shares = [choice.loss / total if total > 0 else 0.0 for choice in item]
    text = f"{_form(forms, index)} make {shares[index]:.1e} of the loss"
    cheaper = [at for at, choice in enumerate(item) if choice.cost < item[index].cost]
    if not cheaper:
        return text
    near = max(cheaper, key=lambda at: (item[at].cost, -item[at].loss))
    return f"{text}, {_form(forms, near)} {shares[near]:.1e}"


def _form(forms: Sequence[QuantSpec], index: int) -> str:
    """The bits, and the group size if that is chosen too."""
    several = len({form.group_size for form in forms}) > 1
    group = f" in groups of {forms[index].group}" if several else ""
    return f"{forms[index].width} bits{group}"

"""`check_quantizer`: the contract of a quantization method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import GroupAffine, group_count
from qalora_compile.ir.lazy_tensor import defer, make_lazy, materialize
from qalora_compile.ir.torch_internals import FakeTensorMode
from qalora_compile.quantizers.base import Method
from qalora_compile.quantizers.registry import get_method, quantize_weight
from qalora_compile.quantizers.statistics import ActivationStatistics
from qalora_compile.testing.contract import Contract, bits_of

_SHAPES = ((5, 32, 8), (3, 20, 8), (2, 12, 32), (1, 1, 4))
"""N, K and group size: plain, with a tail group, one group wider than a row, one weight."""
_PARTS = ("codes", "scale", "offset")
_ROWS = 48


def check_quantizer(name: str, *, bits: Sequence[int] = SUPPORTED_BITS) -> None:
    """Assert that a registered method keeps the contract of quantizers.

    The clauses:
      * specification: `QuantSpec(method=name)` is accepted and converts to JSON and back;
      * form: codes, scale and offset satisfy `GroupAffine.validate` and have the shape, bits and
        group size that were asked for, with shorter tail groups and rows within one group too;
      * precision: scale and offset are float64 for a float64 weight, else float32;
      * determinism: the same bits for any state of the random generator, which does not change;
      * purity: the weight and the statistics do not change;
      * error: no weight moves by more than `max_error` of the method times the range of its group;
      * refusal: NaN and infinite weights are refused with `UserInputError`, and so are missing
        statistics where the method needs data;
      * laziness: a deferred weight gets the same codes, if no data are needed.

    Args:
        name: Name of the method.
        bits: Widths of codes to try.

    Raises:
        ContractError: a clause does not hold; it is named.
    """
    __tracebackhide__ = True
    contract = Contract(f"the quantizer {name}")
    with contract.clause("specification: QuantSpec accepts the name, and goes to JSON and back"):
        method, spec = get_method(name), QuantSpec(method=name)
        assert QuantSpec.from_json(spec.to_json()) == spec
    for n, k, group in _SHAPES:
        for width in bits:
            spec = QuantSpec(method=name, bits=width, group_size=group, refine_offsets=False)
            for label, weight in _weights(n, k):
                _check_weight(contract, method, spec, weight, f"{label} [{n}, {k}], {width} bits")
    spec = QuantSpec(method=name, group_size=8, refine_offsets=False)
    _check_refusals(contract, method, spec)
    if not method.needs_data:
        _check_lazy(contract, method, spec)


def _weights(n: int, k: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        yield str(dtype).removeprefix("torch."), weight.to(dtype)
    yield "equal weights", torch.full((n, k), 0.37)
    yield "zeros", torch.zeros(n, k)
    yield "large weights", weight.float() * 1e30
    outlier = weight.float()
    outlier[0, 0] = 40.0
    yield "one outlier", outlier


def _statistics(method: Method, k: int) -> ActivationStatistics | None:
    generator = torch.Generator().manual_seed(k)
    if not method.needs_data:
        return None
    return ActivationStatistics.of(torch.randn(_ROWS, k, generator=generator))


def _check_weight(
    contract: Contract, method: Method, spec: QuantSpec, weight: Tensor, what: str
) -> None:
    statistics = _statistics(method, weight.shape[1])
    kept = [bits_of(weight)] + ([bits_of(statistics.moment)] if statistics else [])
    with contract.clause(f"form: the quantizer takes {what}"):
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        affine = method.quantize(weight, spec, statistics).affine.validate()
        moved = not torch.equal(state, torch.random.get_rng_state())
        torch.manual_seed(2)
        again = method.quantize(weight, spec, statistics).affine
    _check_form(contract, affine, spec, weight, what)
    same = all(bits_of(getattr(affine, p)) == bits_of(getattr(again, p)) for p in _PARTS)
    contract.need(f"determinism: the same bits for {what}", same, "they differ")
    contract.need("determinism: the random generator stays", not moved, "its state changed")
    now = [bits_of(weight)] + ([bits_of(statistics.moment)] if statistics else [])
    contract.need("purity: weight and statistics stay", kept == now, f"{what} changed")
    part = method.max_error
    most = 0.5 / (2**spec.width - 1) if part is None else part
    worst, place = _excess(weight, affine, most)
    contract.need(
        f"error: no weight moves by more than {most:.3g} of the range of its group, for {what}",
        worst <= 0,
        f"a weight of row {place[0]}, column {place[1]} moves further by {worst:.3g}",
    )


def _check_form(
    contract: Contract, affine: GroupAffine, spec: QuantSpec, weight: Tensor, what: str
) -> None:
    shape = (*weight.shape, group_count(weight.shape[1], spec.group))
    found = (*affine.shape, affine.groups)
    contract.need(f"form: [N, K] and groups of {what}", found == shape, f"{found}, not {shape}")
    wanted = (spec.width, spec.group)
    got = (affine.bits, affine.group_size)
    contract.need(f"form: bits and group size of {what}", got == wanted, f"{got}, not {wanted}")
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    dtypes = {affine.scale.dtype, affine.offset.dtype}
    contract.need(f"precision: {what} gives {stored}", dtypes == {stored}, f"it gives {dtypes}")


def _excess(weight: Tensor, affine: GroupAffine, most: float) -> tuple[float, tuple[int, int]]:
    """The largest excess over the allowed movement of a weight, and where it is."""
    wide, g = weight.double(), affine.group_size
    moved = (affine.dequantize().double() - wide).abs()
    # Storage rounds scale · q, offset, and the sum of both, each by half a unit at most.
    unit = torch.finfo(affine.scale.dtype).eps * 4
    worst, place = float("-inf"), (0, 0)
    for first in range(0, wide.shape[1], g):
        part = wide[:, first : first + g]
        size = part.abs().amax(1, keepdim=True)
        span = part.amax(1, keepdim=True) - part.amin(1, keepdim=True)
        over = moved[:, first : first + g] - most * span - unit * size
        if float(over.max()) > worst:
            worst = float(over.max())
            at = int(over.argmax())
            place = (at // over.shape[1], first + at % over.shape[1])
    return worst, place


def _check_refusals(contract: Contract, method: Method, spec: QuantSpec) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
        weight[1, 3] = value
        with contract.refuses(f"refusal: a weight of {value}", UserInputError):
            quantize_weight(
                method.quantize, weight, spec, path="fc", statistics=_statistics(method, 20)
            )
    if method.needs_data:
        with contract.refuses("refusal: missing statistics", UserInputError):
            method.quantize(torch.ones(3, 20), spec, None)


def _check_lazy(contract: Contract, method: Method, spec: QuantSpec) -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))

    def compute(values: Tensor) -> dict[str, Tensor]:
        affine = quantize_weight(method.quantize, values, spec, path="fc").affine
        return {part: getattr(affine, part) for part in _PARTS}

    with contract.clause("laziness: a weight whose values come later gets the same codes"):
        later = make_lazy(lambda: weight, weight, FakeTensorMode())
        now, made = compute(weight), defer(compute, later)
        for part in _PARTS:
            assert bits_of(materialize(made[part])) == bits_of(now[part]), f"{part} differ"

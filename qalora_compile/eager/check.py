"""The cross-check of the two back-ends: with non-zero adapters, both compute the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.errors import CaptureError, VerificationError
from qalora_compile.ir.program import Program
from qalora_compile.ir.torch_internals import pytree
from qalora_compile.verdict import Verdict
from qalora_compile.verify.compare import Comparison, Report, Tolerance, compare
from qalora_compile.verify.numeric.error_bound import UNITS, rounding_ratio
from qalora_compile.verify.numeric.run_float64 import output_nodes, run_reference, working_dtype

_STRENGTH = 0.25
"""Size of the tried updates relative to the range of codes: well above rounding, but small."""

_FULL = 1e-4
_LEAST_AGREEMENT = 0.1
_RELATIVE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Tolerance by the coarsest dtype: the two round weights and updates at different points."""

_DIFFERS = "the model behaves differently while it is captured; adapt a part of it"

Values = dict[str, tuple[Tensor, Tensor]]
"""The results of program and model, by name of output and mode."""


@dataclass(frozen=True)
class Agreement:
    """Where the unchanged model agrees with its captured program.

    A model may compute some values differently from call to call: torch's own encoder zeroes padded
    rows on its fast path and not elsewhere. Those say nothing about a back-end.

    Attributes:
        masks: By name of output and mode: the values that agree.
    """

    masks: Mapping[str, Tensor]

    @classmethod
    def find(
        cls, captured: Program, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Agreement:
        """Run both without adapters.

        Raises:
            CaptureError: most values of an output differ: capture changed the model's meaning.
        """
        with _evaluating(captured, model):
            values = _run_both(captured, model, args, kwargs)
        masks = {}
        for name, (ours, theirs) in values.items():
            limit = _RELATIVE.get(ours.dtype, _FULL) * ours.abs().max()
            masks[name] = (ours - theirs).abs() <= limit
            if masks[name].float().mean() < _LEAST_AGREEMENT:
                raise CaptureError(
                    f"the captured program does not compute what the model does: {name}",
                    where=type(model).__name__,
                    hint=_DIFFERS,
                )
        return cls(masks)

    def notes(self) -> tuple[str, ...]:
        """The remarks on values that do not agree."""
        return tuple(
            f"{name}: {int((~mask).sum())} of {mask.numel()} values are left out of the check of "
            "the adapted modules: the model itself computes them inconsistently"
            for name, mask in self.masks.items()
            if not bool(mask.all())
        )


def cross_check(
    program: Program,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    agreement: Agreement | None = None,
) -> Report:
    """Run program and model with random adapters, in evaluation mode, and compare.

    Both without and with gradients, since fast paths of torch depend on that. Adapters and modes
    are restored at the end.

    Args:
        program: The adapted program.
        model: The model with adapted modules; the two share their adapters.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        agreement: The values to compare; None compares all.

    Raises:
        VerificationError: they differ; carries the report. The model bypasses some adapter, or
            reads a weight where the graph does not.
    """
    dtypes = {site.dtype for site in program.plan.to_quantize()}
    loosest = max(_RELATIVE.get(getattr(torch, dtype), _FULL) for dtype in dtypes)
    tolerance = Tolerance(max_rel=loosest, rounding=True)
    with _random_adapters(program), _evaluating(program, model):
        values = _run_both(program, model, args, kwargs)
        rows = [
            compare(name, *(v if agreement is None else v[agreement.masks[name]] for v in pair))
            for name, pair in values.items()
        ]
        if not all(map(tolerance.admits, rows)):
            masks = {} if agreement is None else agreement.masks
            rows = _checked(rows, values, masks, program, (args, kwargs))
    passed = all(map(tolerance.admits, rows))
    report = Report(
        reference=f"program ({program.stage})",
        candidate=f"{type(model).__name__} with adapted modules",
        tolerance=tolerance,
        inputs=2,
        outputs=tuple(rows),
        sites=(),
        first_divergence=None,
        verdict=Verdict.of(passed),
    )
    if not passed:
        worst = max(rows, key=lambda row: float("inf") if row.problem else row.max_rel)
        raise VerificationError(
            f"the adapted modules do not compute what the adapted program does: {worst.name} "
            f"{worst.problem or f'differs by {worst.max_rel:.2g} of its scale'}",
            report=report,
            where=type(model).__name__,
            hint="the model reads a weight past its module, or not in every call; adapt the "
            "captured program instead, or exclude that layer. The model is as it was before",
        )
    return report


def _checked(
    rows: Sequence[Comparison],
    values: Values,
    masks: Mapping[str, Tensor],
    program: Program,
    call: tuple[Sequence[Any], Mapping[str, Any]],
) -> list[Comparison]:
    """The comparisons, with how rounding alone explains them: the model may be badly conditioned.

    The program is run in float64; both modes of each output are held against that.
    """
    working = working_dtype(program)
    nodes = list(output_nodes(program).values())
    leaves = program.leaves(tuple(call[0]), dict(call[1]))
    exact, own = run_reference(program, leaves, nodes, working)
    floats = [name for name in nodes if name in exact and exact[name].is_floating_point()]
    checked = []
    for row, (name, (_, theirs)) in zip(rows, values.items(), strict=True):
        node = floats[int(name.split()[1])]
        left_out = ~masks[name] if name in masks else None
        ratio = rounding_ratio(exact[node], own[node], theirs, UNITS[working], left_out)
        checked.append(dataclasses.replace(row, rounding=ratio))
    return checked


def _run_both(
    program: Program, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Values:
    found: Values = {}
    for mode, grad in (("no_grad", False), ("grad", True)):
        with torch.set_grad_enabled(grad):
            ours, theirs = (_outputs(f(*args, **kwargs)) for f in (program, model))
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise CaptureError(
                f"program and model return different tensors ({mode}): "
                f"{[list(t.shape) for t in ours]} and {[list(t.shape) for t in theirs]}",
                where=type(model).__name__,
                hint=_DIFFERS,
            )
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            found[f"output {index} ({mode})"] = pair
    return found


def _outputs(value: Any) -> list[Tensor]:
    """The floating tensors of an output, flat."""
    leaves = pytree.tree_leaves(value)
    return [t.detach() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


@contextmanager
def _evaluating(program: Program, model: nn.Module) -> Iterator[None]:
    """Both in evaluation mode; restored afterwards, for each module of the model separately."""
    modes = {module: module.training for module in model.modules()}
    training = program.module.training
    model.eval()
    program.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        program.module.train(training)


@contextmanager
def _random_adapters(program: Program) -> Iterator[None]:
    """In the block, random updates of a visible size; B is restored afterwards."""
    parameters = dict(program.named_adapter_parameters())
    tensors = program.tensors()
    generator = torch.Generator().manual_seed(0)
    before = {}
    with torch.no_grad():
        for name, lora_b in parameters.items():
            path, _, part = name.rpartition(".")
            if part != "lora_B":
                continue
            before[name] = lora_b.clone()
            lora_a = parameters[f"{path}.lora_A"]
            noise = torch.randn(lora_b.shape, generator=generator, dtype=torch.float64)
            noise = noise.to(lora_b)
            size = (noise @ lora_a).std().clamp_min(1e-30)
            lora_b.copy_(noise * (_STRENGTH * tensors[f"{path}.scale"].mean() / size))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)

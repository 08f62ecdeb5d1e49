"""The cross-check of the two back-ends: with adapters at work, both compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qalora_compile.errors import VerificationError
from qalora_compile.ir.program import Program
from qalora_compile.verify.compare import FAIL, PASS, Comparison, Report, Tolerance, compare

_STRENGTH = 0.25
"""Size of the tried updates beside the spread of codes: far above rounding, no other regime."""

_RELATIVE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Admitted difference by the coarsest dtype: the two round weights and updates in other places."""


def cross_check(
    program: Program, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Report:
    """Run program and model with random adapters, in evaluation mode, and compare.

    Without gradients and with them, since fast paths of torch look at both. Adapters and modes are
    as before when it returns.

    Raises:
        VerificationError: they differ; carries the report. The model passes some adapter by, or
            reads a weight in a way that the graph does not.
    """
    rows: list[Comparison] = []
    with _random_adapters(program), _evaluating(program, model):
        for name, grad in (("no_grad", False), ("grad", True)):
            with torch.set_grad_enabled(grad):
                ours, theirs = (_outputs(f(*args, **kwargs)) for f in (program, model))
            rows += [
                compare(f"output {index} ({name})", a, b)
                for index, (a, b) in enumerate(zip(ours, theirs, strict=True))
            ]
    dtypes = {site.dtype for site in program.plan.to_quantize()}
    loosest = max(_RELATIVE.get(getattr(torch, dtype), 1e-4) for dtype in dtypes)
    tolerance = Tolerance(max_rel=loosest)
    passed = all(map(tolerance.admits, rows))
    report = Report(
        reference=f"program ({program.stage})",
        candidate=f"{type(model).__name__} with adapted modules",
        tolerance=tolerance,
        inputs=2,
        outputs=tuple(rows),
        sites=(),
        first_divergence=None,
        verdict=PASS if passed else FAIL,
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


def _outputs(value: Any) -> list[Tensor]:
    """The floating tensors of an output, flat."""
    leaves = pytree.tree_leaves(value)
    return [t.detach() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


@contextmanager
def _evaluating(program: Program, model: nn.Module) -> Iterator[None]:
    """Both in evaluation mode; afterwards as before, each module of the model on its own."""
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
    """Every update random and of a size that shows; afterwards B is what it was."""
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

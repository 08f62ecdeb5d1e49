"""Replay of a program's passes on another capture of the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.lazy_tensor import is_lazy
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import QUANTIZE, UNUSED, Site, SitePlan
from qalora_compile.ir.stages import ANNOTATED
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.framework.base import Pass
from qalora_compile.passes.framework.pipeline import Pipeline


def replay(source: Program, captured: Program) -> Program:
    """Take `captured` to the stage of `source` by the same passes, with the tensors of `source`.

    This is for a graph of the same model with other inputs, such as a key-value cache: adapters are
    trained on one graph and deployed in the other. Tensors are matched by name.

    Args:
        source: A program with its history of passes.
        captured: At stage `float`; its weights may be deferred tensors without a recipe.

    Raises:
        PreconditionError: the models differ: a tensor is missing, or has another shape or dtype.
        UserInputError: a pass of the history belongs to an extension that is not installed.
    """
    replayed = Pipeline(_steps(source))(captured).program
    return _give_tensors(source, replayed)


def _steps(source: Program) -> tuple[Pass, ...]:
    """The passes of a history.

    Raises:
        UserInputError: one is unknown: it belongs to an extension that is not installed.
    """
    if not source.history:
        return ()
    try:
        return Pipeline.parse(",".join(source.history)).passes
    except UserInputError as error:
        error.where = error.where or "the history of the program"
        raise


def replay_part(source: Program, captured: Program) -> Program:
    """`replay` for a capture of a part of the model, such as its encoder.

    The plan of `source` decides what is quantized, with its reasons: a part does not show ties to
    another part, and patterns may only name layers of another part.

    Args, Raises: see `replay`.
    """
    decided = {_key(row): row for row in source.plan}
    clash = next((r for r in source.plan if decided[_key(r)].decision != r.decision), None)
    if clash is not None:
        raise PreconditionError(
            f"the weight {clash.weight} is quantized for one use and kept for another of one shape",
            where=clash.name,
            hint="quantize it for all its uses, or for none",
        )
    part = captured
    for step in _steps(source):
        if isinstance(step, AnnotateLinears):
            part = _annotate(part, decided)
        elif part.stage != ANNOTATED or part.plan.to_quantize():
            part = step(part).program
    part = dataclasses.replace(part, history=source.history)
    return _give_tensors(source, part.evolve(stage=source.stage))


_Key = tuple[str, str, int, int]


def _key(row: Site) -> _Key:
    """An identity of a use in any capture, as the numbers of repeated uses differ."""
    return row.weight, row.kind, row.k, row.n


def _annotate(part: Program, decided: Mapping[_Key, Site]) -> Program:
    """Copy the decisions, with their reasons."""
    linears = [row for row in AnnotateLinears()(part).program.plan if row.n]
    wanted = [r.name for r in linears if (d := decided.get(_key(r))) and d.decision == QUANTIZE]
    annotated = AnnotateLinears(targets=tuple(wanted))(part).program
    rows = []
    for row in annotated.plan:
        known = decided.get(_key(row))
        if row.kind == UNUSED and known is None:
            continue  # another part reads it
        rows.append(row if known is None else dataclasses.replace(row, reason=known.reason))
    return annotated.evolve(plan=SitePlan(tuple(rows)))


def _give_tensors(source: Program, replayed: Program) -> Program:
    """`replayed` with the tensors of `source` of the same names.

    Raises:
        PreconditionError: see `replay`.
    """
    given = source.tensors()
    tensors = {}
    for name, tensor in replayed.tensors().items():
        found = given.get(name)
        if found is None and is_lazy(tensor):
            raise PreconditionError(
                f"the program has no tensor {name}, which this capture of its model reads",
                where=name,
                hint="capture the model that the program was made from",
            )
        if found is not None and (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise PreconditionError(
                f"{name} is {found.dtype} {list(found.shape)} in the program and {tensor.dtype} "
                f"{list(tensor.shape)} in this capture of its model",
                where=name,
                hint="capture the model that the program was made from",
            )
        tensors[name] = tensor if found is None else found
    plan = replayed.plan
    for field in ("why_bits", "why_rank"):
        plan = plan.explain(field, {site.path: getattr(site, field) for site in source.plan})
    return replayed.evolve(graph=replayed.copy_graph(), tensors=tensors, plan=plan)

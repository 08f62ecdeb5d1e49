"""Run the passes of one program on another capture of the same model."""

from __future__ import annotations

from qalora_compile.errors import PreconditionError
from qalora_compile.ir.deferred import is_deferred
from qalora_compile.ir.program import Program
from qalora_compile.passes.pipeline import Pipeline


def replay(source: Program, captured: Program) -> Program:
    """`captured`, taken to the stage of `source` by the same passes, with the tensors of `source`.

    For a graph with other inputs of the same model, such as a key-value cache: what was trained on
    one is deployed in the other. Tensors are matched by name.

    Args:
        source: With its history of passes.
        captured: At stage `float`; its weights may be deferred tensors without a recipe.

    Raises:
        PreconditionError: the two are not of the same model: a tensor is missing, or has another
            shape or dtype.
    """
    history = source.history
    replayed = Pipeline.parse(",".join(history))(captured).program if history else captured
    given = source.tensors()
    tensors = {}
    for name, tensor in replayed.tensors().items():
        found = given.get(name)
        if found is None and is_deferred(tensor):
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

"""Choice of the bits of embeddings and heads for a file, by what the codes lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from qalora_compile.config import AUTO, FLOAT
from qalora_compile.errors import UserInputError
from qalora_compile.ir.lazy_tensor import is_lazy, materialize, materialize_parts
from qalora_compile.ir.program import Program
from qalora_compile.passes.analysis.find_weight_uses import Use
from qalora_compile.passes.quantize_embeddings import (
    KEPT,
    QuantizeEmbeddings,
    embedding_weights,
)
from qalora_compile.quantizers.minmax import quantize_integer_zero

LOSS_LIMIT = 2.0**-10
"""The largest loss, relative RMS, that `auto` takes.

Codes of 8 bits of a table of floats lose about 4.7e-3, and with such a table SmolLM2-135M wrote
other greedy tokens for 9 of 20 prompts. A table that was stored in at most 8 bits loses nothing."""
_BITS = 8
_GROUPS = (32, 16)
_ROWS = 1 << 13
"""Rows of a table in memory that are measured at a time."""


@dataclass(frozen=True)
class EmbeddingChoice:
    """How embeddings and heads are written.

    Attributes:
        step: The pass that quantizes them; None leaves the program as it is.
        loss: ‖W − Ŵ‖ / ‖W‖ of the worst table; None if nothing was measured.
        reason: Why, for people.
    """

    step: QuantizeEmbeddings | None
    loss: float | None
    reason: str


def choose_embeddings(
    program: Program, wanted: int | str, *, required: bool = True
) -> EmbeddingChoice:
    """Choose by what was asked for and, for `"auto"`, by the loss.

    Args:
        program: Quantized, adapted or folded.
        wanted: `"float"`, `"auto"`, or a number of bits.
        required: For a number of bits, it is an error if nothing can be quantized.

    Raises:
        UserInputError: there is no embedding and no head in float, and one is required.
    """
    done = next((site for site in program.plan if site.frozen_integer_zero), None)
    if done is not None:
        return EmbeddingChoice(None, None, f"{done.bits} bits, as in the program")
    if wanted == FLOAT:
        return EmbeddingChoice(None, None, "float")
    uses, kept = embedding_weights(program)
    if not uses:
        why = "; ".join(f"{skip.path}: {skip.why}" for skip in kept if skip.what == KEPT)
        if wanted != AUTO and required:
            raise UserInputError(
                "there is no embedding and no head to quantize",
                where=why or "the model has none",
                hint="leave out the option for embeddings",
            )
        return EmbeddingChoice(None, None, f"float: {why or 'the model has none'}")
    return _by_loss(uses) if wanted == AUTO else _as_asked(uses, int(wanted))


def _as_asked(uses: list[Use], bits: int) -> EmbeddingChoice:
    step = QuantizeEmbeddings(bits=bits, group_size=_GROUPS[0])
    loss = max(table_loss(use, bits, step.group_size) for use in uses)
    return EmbeddingChoice(step, loss, _said(step, loss))


def _said(step: QuantizeEmbeddings, loss: float) -> str:
    what = "as exact as the table" if loss == 0 else f"which changes the table by {loss:.1e}"
    return f"{step.bits} bits in groups of {step.group_size}, {what}"


def _by_loss(uses: list[Use]) -> EmbeddingChoice:
    """8 bits in the groups that lose least, if that is within the limit."""
    losses = {}
    for group_size in _GROUPS:
        losses[group_size] = max(table_loss(use, _BITS, group_size, LOSS_LIMIT) for use in uses)
        if losses[group_size] == 0:
            break
    group_size, loss = min(losses.items(), key=lambda item: item[1])
    if loss > LOSS_LIMIT:
        why = f"float: {_BITS} bits would change the table by {loss:.1e} (relative RMS)"
        return EmbeddingChoice(None, loss, f"{why}, more than {LOSS_LIMIT:.1e}")
    step = QuantizeEmbeddings(bits=_BITS, group_size=group_size)
    return EmbeddingChoice(step, loss, _said(step, loss))


def table_loss(use: Use, bits: int, group_size: int, limit: float = math.inf) -> float:
    """‖W − Ŵ‖ / ‖W‖ of a table on codes; of its first part only if that is beyond `limit`."""
    error = total = 0.0
    for part in _parts(use):
        wide = part.double()
        coded = quantize_integer_zero(part, bits, group_size).dequantize().double()
        error += float((coded - wide).square().sum())
        total += float(wide.square().sum())
        if error > limit**2 * total:
            break
    return math.sqrt(error / total) if total else 0.0


def _parts(use: Use) -> Iterator[Tensor]:
    """The rows of a table, some at a time where it is read as it is stored."""
    linear = use.linear
    if linear is not None and (linear.flipped or linear.weight.views):
        yield linear.matrix(materialize(use.tensor).detach())
    elif is_lazy(use.tensor):
        yield from materialize_parts(use.tensor)
    else:
        yield from use.tensor.detach().split(_ROWS)

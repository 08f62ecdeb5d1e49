"""Calibration calls of a language model, from training examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.training.evaluate import model_inputs
from qalora_compile.training.examples import Example, collate

_BATCH = 4


def calibration_calls(
    program: Program, examples: Sequence[Example], samples: int
) -> list[dict[str, Any]]:
    """Calls of a language model on the first `samples` examples, padded in small batches.

    Raises:
        UserInputError: none is asked for, or the examples are padded and the model takes no mask.
    """
    if samples < 1:
        raise UserInputError(f"calibration samples: {samples}", hint="use 1 or more")
    chosen = examples[:samples]
    masked = any(leaf.name == "attention_mask" for leaf in program.signature.inputs)
    size = _BATCH if masked else 1  # without a mask, padding would count as data
    batches = [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    return [model_inputs(program, b.input_ids, b.attention_mask, *b.source) for b in batches]

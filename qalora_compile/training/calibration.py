"""Calibration calls of a language model, from training examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.training.data.example import Example, collate
from qalora_compile.training.evaluate import model_inputs

_BATCH = 4


def calibration_calls(
    program: Program, examples: Sequence[Example], samples: int
) -> list[dict[str, Any]]:
    """Calls of a language model on the first `samples` examples, padded in small batches.

    Models with an encoder or without a mask get one example per call, without padding.

    Raises:
        UserInputError: no sample is asked for.
    """
    if samples < 1:
        raise UserInputError(f"calibration samples: {samples}", hint="use 1 or more")
    chosen = examples[:samples]
    masked = any(leaf.name == "attention_mask" for leaf in program.signature.inputs)
    # Without a mask, padding would count as data; encoder-decoder models have none for the decoder.
    size = _BATCH if masked and not any(example.source for example in chosen) else 1
    batches = [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    return [model_inputs(program, b.input_ids, b.attention_mask, *b.source) for b in batches]

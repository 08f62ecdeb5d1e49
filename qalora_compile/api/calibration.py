"""Calibration calls from files, as `finetune` and `quantize` read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from qalora_compile.api.finetune_data import check_trainable, load_files
from qalora_compile.api.finetune_spec import ReadingSpec
from qalora_compile.capture.load_source import Source
from qalora_compile.files.replacing import staging_of
from qalora_compile.ir.program import Program
from qalora_compile.training.calibration import calibration_calls
from qalora_compile.training.data.example import Example
from qalora_compile.training.data.read_rows import find_files

_WORK = "learned"


def calls_from_files(
    program: Program,
    files: Sequence[str],
    samples: int,
    source: Source,
    reading: ReadingSpec,
    *,
    classes: tuple[str, ...] = (),
    pairs: bool = False,
) -> list[dict[str, Any]]:
    """Calibration calls on the first examples of files, of which each gives one in its turn.

    So several kinds of text, one in each file, have the same share.

    Args:
        program: The captured model.
        files: Files, patterns or folders.
        samples: Number of examples.
        source: The model's tokenizer.
        reading: How rows are read.
        classes: Class names of a classification task.
        pairs: Whether the rows are pairs of answers.

    Raises:
        UserInputError: a file cannot be read, or a token is not in the vocabulary.
        UnsupportedError: the model gives no logits.
    """
    found = [
        load_files(
            reading, [str(file)], source.tokenizer, source.decoder_start, classes, pairs=pairs
        )
        for file in find_files(files)
    ]
    check_trainable(program, classes, *found)
    mixed = list(islice(_in_turn([data.examples for data in found]), max(0, samples)))
    return calibration_calls(program, mixed, samples)


def _in_turn(parts: Sequence[Sequence[Example]]) -> Iterator[Example]:
    rounds = chain.from_iterable(zip_longest(*parts))
    return (example for example in rounds if example is not None)


def work_folder(out: Path) -> Path:
    """Where a method that trains saves its work until the output is complete."""
    return staging_of(out, _WORK)

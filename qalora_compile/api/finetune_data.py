"""The inputs of `finetune`: the model, the task, the examples and their batches."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qalora_compile.api.finetune_spec import FinetuneSpec, ReadingSpec
from qalora_compile.api.forms import packed_form
from qalora_compile.api.run_folder import MODEL
from qalora_compile.capture.classifier import TEXT, classes_of, linear_layers, load_classifier
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.capture.sentence import encoder_folder
from qalora_compile.capture.skeleton import generates
from qalora_compile.config.choices import BY_LENGTH, CLASSIFICATION, EVERYTHING, LANGUAGE, PACKED
from qalora_compile.errors import CaptureError, UnsupportedError, UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.progress import say
from qalora_compile.training.data.batches import Batches, Packed
from qalora_compile.training.data.dataset import Dataset
from qalora_compile.training.data.load_examples import find_classes, first_labelled, load_examples
from qalora_compile.training.data.load_media import load_media
from qalora_compile.training.evaluate import check_logits
from qalora_compile.untrusted.media_processor import AUDIO, IMAGE, MediaProcessor
from qalora_compile.verify.inputs import token_limits

_TOKENS = "input_ids"
_PLURALS = {TEXT: "texts", IMAGE: "images", AUDIO: "recordings"}


def with_task(spec: FinetuneSpec) -> FinetuneSpec:
    """`spec` with its task; if open, the first row of the data decides, before the model is loaded.

    Raises:
        UserInputError: the rows have labels, and the model generates text or cannot get a head.
    """
    reading = spec.reading
    if reading.task is not None:
        return spec
    labelled = first_labelled(reading.data, reading.map)
    if labelled is None:
        return _with(spec, LANGUAGE)
    folder = Path(spec.model)
    if not folder.is_dir():
        problem = "only a model from a Hugging Face folder can get a classification head"
    elif generates(encoder_folder(folder)):
        problem = "the model generates text"
    else:
        return _with(spec, CLASSIFICATION)
    hint = "to train on the labels, give an encoder such as ViT or Wav2Vec2"
    if labelled == TEXT:
        hint = (
            "to train on the labels, give an encoder such as BERT, or write the rows as "
            '{"prompt": text, "completion": label}; to train on the texts alone, finetune '
            "with --task language"
        )
    raise UserInputError(
        f"the data are {_PLURALS[labelled]} with labels, and {problem}",
        where=f"{reading.data[0]}, {spec.model}",
        hint=hint,
    )


def _with(spec: FinetuneSpec, task: str) -> FinetuneSpec:
    return dataclasses.replace(spec, reading=dataclasses.replace(spec.reading, task=task))


def reading_record(reading: ReadingSpec, classes: tuple[str, ...]) -> dict[str, Any]:
    """The entry of `run.json` on how the data were read."""
    return {
        "task": reading.task,
        "map": reading.map,
        "learn": reading.learn,
        "batches": reading.batches,
        "seq_len": reading.seq_len,
        "classes": list(classes),
    }


def recorded_classes(record: dict[str, Any]) -> tuple[str, ...]:
    """The classes of a run that is resumed."""
    return tuple(record["reading"]["classes"])


def load_model(spec: FinetuneSpec) -> tuple[Source, tuple[str, ...]]:
    """The model, and the classes of a classification task, found in the training data."""
    if spec.reading.task == LANGUAGE:
        return load_source(spec.model, zero_points=spec.codes.stored_zero_points), ()
    found = find_classes(spec.reading.data, spec.reading.map)
    reads = first_labelled(spec.reading.data, spec.reading.map) or TEXT
    source = load_classifier(spec.model, found, seed=spec.fit.seed, reads=reads)
    return source, classes_of(source)


def excluded(spec: FinetuneSpec, source: Source) -> tuple[str, ...]:
    """Layers to keep in float: those that the user names, and a head to be trained."""
    return (*spec.codes.exclude, *linear_layers(source.model, source.head))


def load_data(
    spec: FinetuneSpec, tokenizer: Any, decoder_start: int | None, classes: tuple[str, ...]
) -> tuple[Dataset, Dataset | None]:
    """Training data, and held-out data if given."""
    reading, pairs = spec.reading, spec.fit.learns_pairs
    given = tokenizer, decoder_start, classes
    data = load_files(reading, reading.data, *given, pairs=pairs)
    if not reading.eval_data:
        return data, None
    return data, load_files(reading, reading.eval_data, *given, pairs=pairs)


def load_files(
    reading: ReadingSpec,
    files: str | Sequence[str],
    tokenizer: Any,
    decoder_start: int | None,
    classes: tuple[str, ...],
    *,
    pairs: bool = False,
) -> Dataset:
    """The examples of some files, read like the training data.

    Raises:
        UserInputError: see `load_examples` and `load_media`; or an option has no meaning for images
            and recordings.
        UnsupportedError: see `load_examples` and `load_media`.
    """
    if isinstance(tokenizer, MediaProcessor):
        _check_media(reading, pairs=pairs)
        return load_media(files, tokenizer, classes, reading.map)
    return load_examples(
        files,
        tokenizer,
        max_length=reading.seq_len,
        decoder_start=decoder_start,
        learn=reading.learn,
        classes=classes or None,
        cache=reading.data_cache,
        mapping=reading.map,
        pairs=pairs,
    )


def _check_media(reading: ReadingSpec, *, pairs: bool) -> None:
    """Refuse options that are for texts."""
    given = {
        "--data-cache": reading.data_cache is not None,
        f"--learn {EVERYTHING}": reading.learn == EVERYTHING,
        f"--batches {PACKED}": reading.batches == PACKED,
        "--loss dpo or orpo": pairs,
    }
    for option, wrong in given.items():
        if wrong:
            raise UserInputError(
                f"{option} is for texts, and the data are images or recordings",
                hint="leave it out",
            )


def check_trainable(program: Program, classes: tuple[str, ...], *datasets: Dataset | None) -> None:
    """Check, before anything is written, that the model outputs logits and knows every token.

    Raises:
        UnsupportedError: the model outputs no logits, or those of another task; or it only takes
            texts of one length.
        CaptureError: the captured program does not run.
        UserInputError: a token is not in the vocabulary.
    """
    args, kwargs = program.example
    try:
        with torch.no_grad():
            output = program(*args, **kwargs)
    except RuntimeError as error:  # data-dependent sizes
        raise CaptureError(
            f"the captured model does not run on its own example: {error}".splitlines()[0],
            hint="its code depends on values, which capture does not have: train the module itself "
            "with qc.adapt_module_ and your own training loop",
        ) from error
    check_logits(output, len(classes) or None)
    for leaf in program.signature.inputs:
        if leaf.name == _TOKENS and isinstance(leaf.shape[1], int):
            raise UnsupportedError(
                f"the captured model only takes texts of {leaf.shape[1]} tokens: its code makes "
                "their length a constant, as a loop over time does",
                hint="train the module itself with qc.adapt_module_ and your own training loop",
            )
    limit = min(token_limits(program).values(), default=None)
    for data in datasets:
        if data is not None and limit:
            data.check_tokens(limit)


def arrange(
    spec: FinetuneSpec, program: Program, data: Dataset, model: Any
) -> tuple[Program, Batches]:
    """The form of the program to train, which shares its parameters, and the batches.

    Args:
        spec: The specification.
        program: At stage `adapted`.
        data: The training data.
        model: The model that the program was captured from, or the RUN folder.

    Raises:
        UnsupportedError, UserInputError: the specification asks for packing, which the model or the
            data do not allow.
    """
    packed = spec.reading.batches == PACKED
    examples = Packed(data.examples, spec.reading.seq_len) if packed else data.examples
    batches = Batches(
        examples,
        batch_size=spec.fit.batch_size,
        seed=spec.fit.seed,
        by_length=spec.reading.batches == BY_LENGTH,
    )
    if not packed:
        return program, batches
    described = model / MODEL if isinstance(model, Path) else model
    return packed_form(program, described, max_length=spec.reading.seq_len), batches


def report_data(name: str, data: Dataset) -> None:
    """Print how each file is read, and how much of it was cut or skipped."""
    if data.is_lazy:
        say(
            f"note: {name}: {len(data.examples):,} rows are checked, and tokenized during "
            "training; --data-cache tokenizes them all before"
        )
    for file in data.files:
        for remark, count in file.remarks.items():
            say(f"note: {name}: {count} of {file.looked_at} {remark}: {file.path}")
        if file.truncated or file.skipped:
            say(
                f"note: {name}: {file.truncated} of {file.looked_at} examples cut to fit, "
                f"{file.skipped} more skipped (nothing to learn): {file.path}"
            )


def data_rows(data: Dataset, batches: Batches) -> dict[str, object]:
    """Rows of the summary on the data."""
    forms = sum((Counter(file.forms) for file in data.files), Counter[str]())
    rows: dict[str, object] = {
        "examples": len(data.examples),
        "read as": ", ".join(f"{form} ({count})" for form, count in forms.items()),
    }
    if isinstance(batches.examples, Packed):
        rows["packed"] = f"{len(batches.examples)} rows, {batches.examples.fill:.0%} full"
    if data.classes and not data.is_lazy:
        counts = data.labels()
        named = (f"{name} {counts[index]}" for index, name in enumerate(data.classes))
        rows["classes"] = ", ".join(named)
    return rows


def data_figures(
    data: Dataset, held_out: Dataset | None, decisive: Mapping[str, Any]
) -> dict[str, Any]:
    """How much data a model was trained on, and their digest, for a record.

    Args:
        data: The training data.
        held_out: The held-out data.
        decisive: See `FinetuneSpec.decisive`.
    """
    figures = {"examples": len(data.examples), "files": len(data.files)}
    if not data.is_lazy and data.unit == "tokens":
        figures["tokens"] = sum(len(example.tokens) for example in data.examples)
    if held_out is not None:
        figures["held-out examples"] = len(held_out.examples)
    return figures | {"SHA-256": decisive["data"]}

"""What `finetune` reads: files, the form of the data, the task, and how examples make a batch."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from qalora_compile.api import packed_form
from qalora_compile.capture.classifier import classes_of, linear_layers, load_classifier
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.capture.sentence import encoder_folder
from qalora_compile.capture.skeleton import generates
from qalora_compile.cli.folders import MODEL
from qalora_compile.cli.ui import Steps
from qalora_compile.errors import CaptureError, UnsupportedError, UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.training.data.batches import ARRANGEMENTS, BY_LENGTH, PACKED, Batches, Packed
from qalora_compile.training.data.dataset import Dataset
from qalora_compile.training.data.load_examples import begins_labelled, find_classes, load_examples
from qalora_compile.training.data.parse_line import LEARN
from qalora_compile.training.data.row_forms import read_mapping
from qalora_compile.training.evaluate import check_logits
from qalora_compile.verify.inputs import token_limits

LANGUAGE, CLASSIFICATION = "language", "classification"
_TOKENS = "input_ids"
TASKS = (LANGUAGE, CLASSIFICATION)

FORMS = """data, as JSON lines (or .json, .csv, .parquet, .jsonl.gz, a folder, one of datasets):
  {"prompt": "2 + 2 =", "completion": " 4"}      loss on the completion; the only form for T5, BART
  {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
  {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
  {"instruction": "…", "input": "…", "output": "…"}
  {"text": "…"}                                  loss on every token
  {"input_ids": [1, 2, 3]}                       for models without a tokenizer
  {"text": "…", "label": "…"}                    for an encoder: it learns to tell labels apart
other names of fields: --map prompt=question,completion=answer
"""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare files, task and arrangement."""
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="training data: files, patterns or folders",
    )
    parser.add_argument("--eval-data", nargs="+", metavar="FILE", help="held-out data")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--task",
        choices=TASKS,
        help="classification: an encoder learns to tell labels apart, with a new head; found from "
        "the data and the model where left out",
    )
    group.add_argument(
        "--map",
        type=_mapping,
        metavar="FIELD=COLUMN,…",
        help="which fields of the data are read, and as what: prompt=question,completion=answer",
    )
    group.add_argument(
        "--learn",
        default=LEARN[0],
        choices=LEARN,
        help="completions and answers alone, or prompts too",
    )
    group.add_argument(
        "--batches",
        default=ARRANGEMENTS[0],
        choices=ARRANGEMENTS,
        help="by-length pads less; packed lays several examples into one row and pads nothing",
    )
    group.add_argument(
        "--data-cache",
        metavar="DIR",
        help="tokenize into DIR once and read from there: for data larger than memory",
    )


def _mapping(text: str) -> dict[str, str]:
    try:
        return read_mapping(text)
    except UserInputError as error:
        raise argparse.ArgumentTypeError(f"{error.what}; {error.hint}") from error


def find_task(options: argparse.Namespace) -> None:
    """Decide the task where the options leave it open: by the first row, before a model is loaded.

    Raises:
        UserInputError: the rows have labels and the model generates texts, or cannot have a head.
    """
    if options.task is not None:
        return
    options.task = LANGUAGE
    if not begins_labelled(options.data, options.map):
        return
    folder = Path(options.model)
    if not folder.is_dir():
        problem = "only a Hugging Face folder gets a head that tells labels apart"
    elif generates(encoder_folder(folder)):
        problem = "the model generates texts"
    else:
        options.task = CLASSIFICATION
        return
    raise UserInputError(
        f"the data are texts with labels, and {problem}",
        where=f"{options.data[0]}, {options.model}",
        hint="to learn the labels give an encoder such as BERT, or write "
        '{"prompt": text, "completion": label}; to learn the texts alone: --task language',
    )


def reading_record(options: argparse.Namespace, classes: tuple[str, ...]) -> dict[str, Any]:
    """What `run.json` says of how the data were read."""
    return {
        "task": options.task,
        "map": options.map,
        "learn": options.learn,
        "batches": options.batches,
        "seq_len": options.seq_len,
        "classes": list(classes),
    }


def recorded_classes(record: dict[str, Any]) -> tuple[str, ...]:
    """The classes of a run that is resumed."""
    return tuple(record["reading"]["classes"])


def load_model(options: argparse.Namespace) -> tuple[Source, tuple[str, ...]]:
    """The model, and the classes of a classification task, which the training data name."""
    if options.task == LANGUAGE:
        return load_source(options.model, zero_points=options.stored_zero_points), ()
    found = find_classes(options.data, options.map)
    source = load_classifier(options.model, found, seed=options.seed)
    return source, classes_of(source)


def excluded(options: argparse.Namespace, source: Source) -> tuple[str, ...]:
    """Layers to keep in float: those that the user names, and a head that is to be trained."""
    return (*options.exclude, *linear_layers(source.model, source.head))


def load_data(
    options: argparse.Namespace,
    tokenizer: Any,
    decoder_start: int | None,
    classes: tuple[str, ...],
) -> tuple[Dataset, Dataset | None]:
    """Training data, and held-out data where there are any."""

    def load(paths: list[str]) -> Dataset:
        return load_examples(
            paths,
            tokenizer,
            max_length=options.seq_len,
            decoder_start=decoder_start,
            learn=options.learn,
            classes=classes or None,
            cache=options.data_cache,
            mapping=options.map,
        )

    return load(options.data), load(options.eval_data) if options.eval_data else None


def check_trainable(program: Program, classes: tuple[str, ...], *datasets: Dataset | None) -> None:
    """See, before anything is written, that the model gives logits and knows every token.

    Raises:
        UnsupportedError: it gives no logits, or those of another task; or it takes texts of one
            length alone.
        CaptureError: what was captured does not run.
        UserInputError: a token is not in its vocabulary.
    """
    args, kwargs = program.example
    try:
        with torch.no_grad():
            output = program(*args, **kwargs)
    except RuntimeError as error:  # sizes that depend on values
        raise CaptureError(
            f"the captured model does not run on its own example: {error}".splitlines()[0],
            hint="its code depends on values, which capture does not have: train the model itself, "
            "with qc.adapt_module_ and a loop of your own",
        ) from error
    check_logits(output, len(classes) or None)
    for leaf in program.signature.inputs:
        if leaf.name == _TOKENS and isinstance(leaf.shape[1], int):
            raise UnsupportedError(
                f"the captured model takes texts of {leaf.shape[1]} tokens alone: its code makes "
                "their length a constant, as a loop over time does",
                hint="train the model itself, with qc.adapt_module_ and a loop of your own",
            )
    limit = min(token_limits(program).values(), default=None)
    for data in datasets:
        if data is not None and limit:
            data.check_tokens(limit)


def arrange(
    options: argparse.Namespace, program: Program, data: Dataset, model: Any
) -> tuple[Program, Batches]:
    """The form of the program that is trained, which shares its parameters, and its batches.

    Args:
        options: Of the call.
        program: At stage `adapted`.
        data: To train on.
        model: What it was captured from, or the RUN folder.

    Raises:
        UnsupportedError, UserInputError: the data are to be packed, and the model or the data
            cannot be.
    """
    packed = options.batches == PACKED
    examples = Packed(data.examples, options.seq_len) if packed else data.examples
    batches = Batches(
        examples,
        batch_size=options.batch_size,
        seed=options.seed,
        by_length=options.batches == BY_LENGTH,
    )
    if not packed:
        return program, batches
    described = model / MODEL if isinstance(model, Path) else model
    return packed_form(program, described, max_length=options.seq_len), batches


def report_data(shown: Steps, name: str, data: Dataset) -> None:
    """Say how each file is read, and what of it was cut or skipped."""
    if data.is_lazy:
        shown.say(
            f"note: {name}: {len(data.examples):,} rows are checked, and tokenized while training "
            "goes on; --data-cache tokenizes them all before"
        )
    for file in data.files:
        for remark, count in file.remarks.items():
            shown.say(f"note: {name}: {count} of {file.looked_at} {remark}: {file.path}")
        if file.truncated or file.skipped:
            shown.say(
                f"note: {name}: {file.truncated} of {file.looked_at} examples cut to fit, "
                f"{file.skipped} more skipped (nothing to learn): {file.path}"
            )


def data_rows(data: Dataset, batches: Batches) -> dict[str, object]:
    """What a summary says of the data."""
    forms = sum((Counter(file.forms) for file in data.files), Counter[str]())
    rows: dict[str, object] = {
        "examples": len(data.examples),
        "read as": ", ".join(f"{form} ({count})" for form, count in forms.items()),
    }
    if isinstance(batches.examples, Packed):
        rows["packed"] = f"{len(batches.examples)} rows, {batches.examples.fill:.0%} full"
    if data.classes and not data.is_lazy:
        counts = Counter(example.label for example in data.examples)
        named = (f"{name} {counts[index]}" for index, name in enumerate(data.classes))
        rows["classes"] = ", ".join(named)
    return rows

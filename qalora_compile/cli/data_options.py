"""Options of `finetune` for the data: files, form, task and batches."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qalora_compile.cli.options import spec_of
from qalora_compile.config.choices import ARRANGEMENTS, LEARN, TASKS
from qalora_compile.errors import UserInputError

if TYPE_CHECKING:
    from qalora_compile.api.finetune_spec import ReadingSpec

FORMS = """data, as JSON lines (or .json, .csv, .parquet, .jsonl.gz, a folder, a dataset):
  {"prompt": "2 + 2 =", "completion": " 4"}
      loss on the completion; the only form for T5, BART
  {"messages": [{"role": "user", "content": "…"},
                {"role": "assistant", "content": "…"}]}
  {"conversations": [{"from": "human", "value": "…"},
                     {"from": "gpt", "value": "…"}]}
  {"instruction": "…", "input": "…", "output": "…"}
  {"text": "…"}                  loss on every token
  {"input_ids": [1, 2, 3]}       for models without a tokenizer
  {"text": "…", "label": "…"}    classification, for encoders
  {"image": "a.jpg", "label": "…"}, {"audio": "a.wav", "label": "…"}
      the same, for encoders of images or audio; paths start at the data file
  {"prompt": "…", "chosen": "…", "rejected": "…"}    --loss dpo, orpo
other field names: --map prompt=question,completion=answer
"""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the data."""
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
        help="classification trains an encoder with a new head; default: inferred "
        "from data and model",
    )
    add_map_argument(group)
    group.add_argument(
        "--learn",
        default=LEARN[0],
        choices=LEARN,
        help="train on completions and answers only, or on prompts too",
    )
    group.add_argument(
        "--batches",
        default=ARRANGEMENTS[0],
        choices=ARRANGEMENTS,
        help="by-length pads less; packed puts several examples into one row, without padding",
    )
    group.add_argument(
        "--data-cache",
        metavar="DIR",
        help="tokenize once into DIR and read from there, for data larger than memory",
    )


def add_map_argument(group: argparse._ActionsContainer) -> None:
    """Declare `--map`."""
    group.add_argument(
        "--map",
        type=_mapping,
        metavar="FIELD=COLUMN,…",
        help="columns of the data to read as fields: prompt=question,completion=answer",
    )


def _mapping(text: str) -> dict[str, str]:
    from qalora_compile.training.data.row_forms import read_mapping

    try:
        return read_mapping(text)
    except UserInputError as error:
        raise argparse.ArgumentTypeError(f"{error.what}; {error.hint}") from error


def reading_of(options: argparse.Namespace) -> ReadingSpec:
    """The specification of the data."""
    from qalora_compile.api.finetune_spec import ReadingSpec

    return spec_of(ReadingSpec, options)

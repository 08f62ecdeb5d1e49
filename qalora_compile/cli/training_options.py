"""Options of `finetune` for adapters and training, and which of them decide the result."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from qalora_compile.cli.quantized import number_or_auto
from qalora_compile.config import ADAPTER_KINDS, INITS, POOLINGS, ZERO_POINTS, AdapterSpec
from qalora_compile.errors import UserInputError
from qalora_compile.training.data.read_rows import find_files
from qalora_compile.training.distributed import Processes
from qalora_compile.training.forward.autocast import find_device
from qalora_compile.training.records.checkpoint import KEPT
from qalora_compile.training.records.log import REPORT_TO
from qalora_compile.training.records.run_identity import file_digest
from qalora_compile.training.spec import PRECISIONS, SCHEDULES, FitSpec

_ADAPTER, _FIT = AdapterSpec(), FitSpec()
_STEPS = 100
_FREE = frozenset(
    {"command", "run", "out", "overwrite", "resume"}
    | {"save_every", "keep", "report_to", "data_cache", "device"}
)
"""Options that decide nothing about the weights: a run may go on with others."""
_FILES = frozenset({"data", "eval_data", "calibration"})


def add_adapter_arguments(group: argparse._ActionsContainer) -> None:
    """Declare rank, scaling, pooling, start and dropout."""
    group.add_argument("--rank", type=number_or_auto, default=_ADAPTER.rank, metavar="R")
    group.add_argument("--rank-budget", type=int, metavar="P", help="parameters, of --rank auto")
    group.add_argument(
        "--init",
        default=_ADAPTER.init,
        choices=INITS,
        help="svd: adapters, not refined offsets, correct what quantization lost",
    )
    group.add_argument(
        "--adapter",
        default=_ADAPTER.kind,
        choices=ADAPTER_KINDS,
        help="scale: train the scales alone; zero-points stay whole numbers",
    )
    group.add_argument(
        "--zero-point",
        default=_ADAPTER.zero_point,
        choices=ZERO_POINTS,
        help="integer: whole numbers, also after folding: for runtimes that take nothing else",
    )
    group.add_argument("--alpha", type=float, default=_ADAPTER.alpha)
    group.add_argument("--rslora", action="store_true", help="scale by alpha / √rank")
    group.add_argument("--pooling", default=_ADAPTER.pooling, choices=POOLINGS)
    group.add_argument(
        "--dropout", type=float, default=_ADAPTER.dropout, metavar="P", help="of adapters"
    )


def add_training_arguments(group: argparse._ActionsContainer) -> None:
    """Declare the fields of `FitSpec`, and what is saved and reported."""
    add = group.add_argument
    add("--steps", type=int, default=_STEPS, metavar="N")
    add("--batch-size", type=int, default=_FIT.batch_size, metavar="B", help="computed at once")
    add(
        "--accumulate",
        type=int,
        default=_FIT.accumulate,
        metavar="N",
        help="batches a step, for each process",
    )
    add("--seq-len", type=int, default=512, metavar="T", help="longest example")
    add("--lr", type=float, default=_FIT.learning_rate, metavar="F")
    add(
        "--lora-plus-ratio",
        type=float,
        default=_FIT.lora_plus_ratio,
        metavar="F",
        help="rate of B / rate of A",
    )
    add("--weight-decay", type=float, default=_FIT.weight_decay, metavar="F")
    add("--schedule", default=_FIT.schedule, choices=SCHEDULES)
    add("--warmup", type=float, default=_FIT.warmup, metavar="F", help="part of the steps")
    add("--clip", type=float, default=_FIT.clip, metavar="F", help="largest gradient norm")
    add("--precision", default=_FIT.precision, choices=PRECISIONS)
    add(
        "--device",
        metavar="D",
        help="to train on: cuda, cuda:1, …; cpu if not given, under a launcher the process's own",
    )
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--eval-every", type=int, default=0, metavar="N", help="steps; needs --eval-data")
    add(
        "--patience",
        type=int,
        default=0,
        metavar="N",
        help="stop after N evaluations without a lower held-out loss, keep the best adapters",
    )
    add("--seed", type=int, default=_FIT.seed)
    add("--save-every", type=int, default=50, metavar="N", help="checkpoint steps")
    add("--keep", type=int, default=KEPT, metavar="N", help="checkpoints to keep, the last ones")
    add("--report-to", nargs="+", default=[], choices=REPORT_TO, metavar="WHERE")
    add("--resume", action="store_true", help="go on from the last checkpoint")


def adapter_spec(options: argparse.Namespace) -> AdapterSpec:
    """What the options say of adapters.

    Raises:
        UserInputError: a value is out of range.
    """
    return AdapterSpec(
        rank=options.rank,
        alpha=options.alpha,
        pooling=options.pooling,
        use_rslora=options.rslora,
        dropout=options.dropout,
        seed=options.seed,
        init=options.init,
        rank_budget=options.rank_budget,
        kind=options.adapter,
        zero_point="real" if options.adapter == "scale" else options.zero_point,
    )


def device_of(options: argparse.Namespace, processes: Processes) -> torch.device:
    """Where to train.

    Raises:
        UserInputError: the name is none, or a launcher decides.
        UnsupportedError: the device is not there.
    """
    if options.device is None:
        return processes.device
    if processes.count > 1:
        raise UserInputError(
            f"--device {options.device} is given to {processes.count} processes",
            hint="leave it out: each takes the device that its launcher gives it",
        )
    return find_device(options.device)


def fit_spec(options: argparse.Namespace) -> FitSpec:
    """What the options say of training.

    Raises:
        UserInputError: a value is out of range, or fits no other.
    """
    for name in ("save_every", "keep"):
        if getattr(options, name) < 1:
            raise UserInputError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}", hint="use 1 or more"
            )
    if options.eval_every and not options.eval_data:
        raise UserInputError("--eval-every has nothing to evaluate on", hint="give --eval-data")
    named = {"learning_rate": options.lr, "evaluate_every": options.eval_every}
    rest = {f.name for f in dataclasses.fields(FitSpec)} - named.keys()
    return FitSpec(**named, **{name: getattr(options, name) for name in rest})


def decisive_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide to which weights a run leads; files as digests of their contents.

    Raises:
        UserInputError: a data file cannot be read.
    """
    values = {name: v for name, v in vars(options).items() if name not in _FREE}
    for name in _FILES & values.keys():
        if values[name] is not None:
            values[name] = file_digest(find_files(values[name]))
    if Path(options.model).exists():
        values["model"] = str(Path(options.model).resolve())
    return values


def check_options(options: argparse.Namespace, then: dict[str, Any], out: Path) -> None:
    """See that a run goes on with the options that it was started with.

    Raises:
        UserInputError: one has another value, or a data file other contents; the first is named.
    """
    now = decisive_options(options)
    for name in [*now, *(n for n in then if n not in now)]:
        a, b = then.get(name), now.get(name)
        if a == b:
            continue
        option = name if name == "model" else f"--{name.replace('_', '-')}"
        if name in _FILES and None not in (a, b):
            what = f"the contents of {option} are not those that the run was started with"
        else:
            what = f"the run was started with {option} {_said(a)}, not {_said(b)}"
        raise UserInputError(
            what,
            where=str(out),
            hint="give the options of the first call, or start a new run",
        )


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "unset" if value is None else str(value)

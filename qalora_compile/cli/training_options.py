"""Options of `finetune` for adapters and training."""

from __future__ import annotations

import argparse

from qalora_compile.cli.options import spec_of
from qalora_compile.cli.quantized import number_or_auto
from qalora_compile.config import ADAPTER_KINDS, INITS, POOLINGS, ZERO_POINTS, AdapterSpec
from qalora_compile.config.choices import CHECKPOINTS_KEPT, LOSSES, REPORT_TO
from qalora_compile.config.fit import PRECISIONS, SCHEDULES, FitSpec

_ADAPTER, _FIT = AdapterSpec(), FitSpec()
_STEPS = 100


def add_adapter_arguments(group: argparse._ActionsContainer) -> None:
    """Declare rank, scaling, pooling, initialization and dropout."""
    group.add_argument(
        "--rank",
        type=number_or_auto,
        default=_ADAPTER.rank,
        metavar="R",
        help="rank of the adapters, or auto, within --rank-budget",
    )
    group.add_argument("--rank-budget", type=int, metavar="P", help="parameters for --rank auto")
    group.add_argument(
        "--init",
        default=_ADAPTER.init,
        choices=INITS,
        help="svd: adapters, instead of refined offsets, correct the quantization error",
    )
    group.add_argument(
        "--adapter",
        default=_ADAPTER.kind,
        choices=ADAPTER_KINDS,
        help="scale: train the scales only, zero-points stay integers; affine: scales with the "
        "offsets; qat: codes too",
    )
    group.add_argument(
        "--zero-point",
        default=_ADAPTER.zero_point,
        choices=ZERO_POINTS,
        help="integer: stay integers after folding, for runtimes that take no others",
    )
    group.add_argument(
        "--alpha",
        type=float,
        default=_ADAPTER.alpha,
        metavar="F",
        help="updates are scaled by alpha / rank",
    )
    group.add_argument("--rslora", action="store_true", help="scale by alpha / √rank")
    group.add_argument(
        "--pooling",
        default=_ADAPTER.pooling,
        choices=POOLINGS,
        help="how the inputs of a group are pooled before A",
    )
    group.add_argument(
        "--dropout", type=float, default=_ADAPTER.dropout, metavar="P", help="dropout of adapters"
    )


def add_training_arguments(group: argparse._ActionsContainer) -> None:
    """Declare the fields of `FitSpec`, and what is saved and reported."""
    _add_batches(group)
    _add_optimizer(group)
    _add_records(group)


def _add_batches(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add("--steps", type=int, default=_STEPS, metavar="N", help="optimizer steps")
    add(
        "--epochs",
        type=float,
        metavar="F",
        help="how often all examples are read, in place of --steps (default: --steps decides)",
    )
    add("--batch-size", type=int, default=_FIT.batch_size, metavar="B", help="examples per batch")
    add(
        "--accumulate",
        type=int,
        default=_FIT.accumulate,
        metavar="N",
        help="batches per step and process",
    )
    add("--seq-len", type=int, default=512, metavar="T", help="longest example, in tokens")
    add("--seed", type=int, default=_FIT.seed, metavar="N", help="order of the data, dropout")
    add(
        "--device",
        metavar="D",
        help="cuda, cuda:1, …; default: cpu, or the device that a launcher assigns",
    )
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")


def _add_optimizer(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add(
        "--lr",
        type=float,
        default=_FIT.learning_rate,
        metavar="F",
        help="peak learning rate of AdamW",
    )
    add(
        "--lora-plus-ratio",
        type=float,
        default=_FIT.lora_plus_ratio,
        metavar="F",
        help="learning rate of B / that of A",
    )
    add(
        "--loss",
        default=_FIT.loss,
        choices=LOSSES,
        help="dpo, orpo: learn to prefer chosen to rejected answers",
    )
    add("--beta", type=float, default=_FIT.beta, metavar="F", help="beta of dpo, lambda of orpo")
    add(
        "--adaptive-rank",
        type=float,
        metavar="R",
        help="mean rank of adapters at the end: training takes ranks from where they matter least",
    )
    add("--weight-decay", type=float, default=_FIT.weight_decay, metavar="F", help="of AdamW")
    add(
        "--schedule",
        default=_FIT.schedule,
        choices=SCHEDULES,
        help="how the rate falls after the warm-up; constant runs can be lengthened",
    )
    add("--warmup", type=float, default=_FIT.warmup, metavar="F", help="fraction of the steps")
    add("--clip", type=float, default=_FIT.clip, metavar="F", help="largest gradient norm")
    add(
        "--neftune-alpha",
        type=float,
        default=_FIT.neftune_alpha,
        metavar="F",
        help="size of the noise on input embeddings in training (NEFTune), e.g. 5",
    )
    add(
        "--precision",
        default=_FIT.precision,
        choices=PRECISIONS,
        help="of linear maps and attention; adapters are always float32",
    )


def _add_records(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add(
        "--eval-every",
        type=int,
        default=0,
        metavar="N",
        help="steps between evaluations on --eval-data; 0: before and after training only",
    )
    add(
        "--patience",
        type=int,
        default=0,
        metavar="N",
        help="stop after N evaluations without a lower held-out loss, and keep the best adapters; "
        "0: never",
    )
    add("--save-every", type=int, default=50, metavar="N", help="steps between checkpoints")
    add(
        "--keep",
        type=int,
        default=CHECKPOINTS_KEPT,
        metavar="N",
        help="keep the last N checkpoints",
    )
    add(
        "--report-to",
        nargs="+",
        default=[],
        choices=REPORT_TO,
        metavar="WHERE",
        help=f"also log to: {', '.join(REPORT_TO)}",
    )
    add("--resume", action="store_true", help="resume from the last checkpoint")


def adapter_spec(options: argparse.Namespace) -> AdapterSpec:
    """The specification of the adapters.

    Raises:
        UserInputError: a value is out of range.
    """
    return spec_of(
        AdapterSpec,
        options,
        group_size=None,
        use_rslora=options.rslora,
        kind=options.adapter,
        zero_point="real" if options.adapter == "scale" else options.zero_point,
    )


def fit_spec(options: argparse.Namespace) -> FitSpec:
    """The specification of the training.

    Raises:
        UserInputError: a value is out of range, or options conflict.
    """
    named = {"learning_rate": options.lr, "evaluate_every": options.eval_every}
    return spec_of(FitSpec, options, **named)

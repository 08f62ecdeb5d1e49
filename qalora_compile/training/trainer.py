"""A `FitSpec` for the trainers of Hugging Face: `transformers.Trainer` and TRL's `SFTTrainer`.

They train models with adapted modules (`qc.adapt_module_`) on the batches that `fit` would take, at
its rates, so that the losses are those of `fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training.batches import Batches
from qalora_compile.training.examples import Example, collate
from qalora_compile.training.optimizer import make_optimizer, make_schedule
from qalora_compile.training.spec import FitSpec


def trainer_arguments(spec: FitSpec) -> dict[str, Any]:
    """What `TrainingArguments`, or `SFTConfig`, have to say for a trainer to do what `fit` does.

    Early stopping is a trainer's own affair (its `EarlyStoppingCallback`).

    Raises:
        UnsupportedError: `spec` asks for evaluation.
    """
    if spec.evaluate_every:
        raise UnsupportedError(
            "a trainer evaluates by its own options", hint="set evaluate_every and patience to 0"
        )
    return {
        "max_steps": spec.steps,
        "per_device_train_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.accumulate,
        "max_grad_norm": spec.clip,
        "bf16": spec.precision == "bfloat16",
        "seed": spec.seed,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }


def trainer_optimizers(model: nn.Module, spec: FitSpec) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimizer of the adapters and its schedule, for the trainer's `optimizers`."""
    optimizer = make_optimizer(model, spec)
    return optimizer, make_schedule(optimizer, spec)


def trainer_rows(
    examples: Sequence[Example], spec: FitSpec, *, processes: int = 1
) -> list[dict[str, list[int]]]:
    """The examples of all micro-batches in the order in which `fit` takes them.

    Args:
        examples: At least one.
        spec: Steps, batch size and seed.
        processes: How many train together.

    Raises:
        UserInputError: there are fewer examples than a batch holds.
    """
    if len(examples) < spec.batch_size:
        raise UserInputError(
            f"{len(examples)} examples make no batch of {spec.batch_size}",
            hint="use a smaller batch_size",
        )
    batches = Batches(examples, batch_size=spec.batch_size, seed=spec.seed)
    rows = []
    for index in range(spec.steps * spec.accumulate * processes):
        batch = batches.at(index)
        for tokens, mask, labels in zip(
            batch.input_ids.tolist(), batch.attention_mask, batch.labels.tolist(), strict=True
        ):
            size = int(mask.sum())
            rows.append({"input_ids": tokens[:size], "labels": labels[:size]})
    return rows


def trainer_collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of rows, padded as in `fit`: for the trainer's `data_collator`."""
    batch = collate([Example(tuple(r["input_ids"]), tuple(r["labels"])) for r in rows])
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
    }

"""A `FitSpec` for the trainers of Hugging Face: `transformers.Trainer` and TRL's `SFTTrainer`.

They train models with adapted modules (`qc.adapt_module_`) on the same batches as `fit` and at the
same rates, so that the losses are those of `fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from qalora_compile.config.fit import FitSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training.data.batches import Batches, Packed
from qalora_compile.training.data.example import Batch, Example, collate
from qalora_compile.training.optimizer import make_optimizer, make_schedule


def trainer_arguments(spec: FitSpec) -> dict[str, Any]:
    """The arguments for `TrainingArguments` or `SFTConfig` that make a trainer do what `fit` does.

    For early stopping, use the trainer's `EarlyStoppingCallback`.

    Raises:
        UnsupportedError: `spec` asks for evaluation, for a loss of preferences, or for adaptive
            ranks.
    """
    if spec.learns_pairs:
        raise UnsupportedError(
            f"these arguments are of trainers of cross-entropy, not of {spec.loss}",
            hint="train with fit, or with TRL's own trainers",
        )
    if spec.adaptive_rank is not None:
        raise UnsupportedError("a trainer does not move ranks between layers", hint="use fit")
    if spec.evaluate_every:
        raise UnsupportedError(
            "a trainer has its own options for evaluation",
            hint="set evaluate_every and patience to 0",
        )
    return {
        "max_steps": spec.steps,
        "per_device_train_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.accumulate,
        "max_grad_norm": spec.clip,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "bf16": spec.precision == "bfloat16",
        "neftune_noise_alpha": spec.neftune_alpha or None,
        "seed": spec.seed,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }


def trainer_optimizers(model: nn.Module, spec: FitSpec) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimizer of the adapters and its schedule, for a trainer's argument `optimizers`."""
    optimizer = make_optimizer(model, spec)
    return optimizer, make_schedule(optimizer, spec)


def trainer_rows(
    examples: Sequence[Example], spec: FitSpec, *, processes: int = 1
) -> list[dict[str, list[int]]]:
    """The examples of all micro-batches in the order in which `fit` takes them.

    Args:
        examples: Examples that are texts.
        spec: Steps, batch size and seed.
        processes: Number of processes that train together.

    Raises:
        UserInputError: there are fewer examples than a batch holds.
        UnsupportedError: they are batches, packed, labelled, or for a model with an encoder. Rows
            cannot express that, and a trainer would compute another loss.
    """
    if isinstance(examples, (Batches, Packed)):
        raise _unsupported("examples in batches or packed")
    if len(examples) < spec.batch_size:
        raise UserInputError(
            f"{len(examples)} examples do not fill a batch of {spec.batch_size}",
            hint="use a smaller batch_size",
        )
    batches = Batches(examples, batch_size=spec.batch_size, seed=spec.seed)
    rows = []
    for index in range(spec.steps * spec.accumulate * processes):
        batch = batches.at(index)
        _check_batch(batch)
        for tokens, mask, labels in zip(
            batch.input_ids.tolist(), batch.attention_mask, batch.labels.tolist(), strict=True
        ):
            size = int(mask.sum())
            rows.append({"input_ids": tokens[:size], "labels": labels[:size]})
    return rows


def _check_batch(batch: Batch) -> None:
    if batch.source:
        raise _unsupported("examples for a model with an encoder")
    if batch.labels.dim() == 1:
        raise _unsupported("classes of complete texts")
    if batch.pairs:
        raise _unsupported("pairs of answers")
    if bool((batch.attention_mask > 1).any()):
        raise _unsupported("packed examples")


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"the rows for a trainer cannot hold {what}",
        hint="give texts one by one, or train with fit, which takes these",
    )


def trainer_collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of rows, padded as in `fit`, for a trainer's argument `data_collator`."""
    batch = collate([Example(tuple(r["input_ids"]), tuple(r["labels"])) for r in rows])
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
    }

"""Held-out loss and accuracy of anything that gives logits: a program or an ONNX session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.program import Program
from qalora_compile.progress import track
from qalora_compile.training.data import IGNORED, Batch, Example, collate

Forward = Callable[[Tensor, Tensor], Tensor]
"""(input_ids [B, T], attention_mask [B, T]) → logits [B, T, V]."""


@dataclass(frozen=True)
class Metrics:
    """Held-out figures.

    Attributes:
        loss: Mean cross-entropy, in nats, over the tokens that carry loss.
        token_accuracy: Part of these tokens that is the most likely one.
        exact_match: Part of the examples of which every such token is.
        choice_accuracy: Part of the examples whose first such token is the likeliest of the given
            choices; None where no choices were given.
        examples: How many were evaluated.
    """

    loss: float
    token_accuracy: float
    exact_match: float
    choice_accuracy: float | None
    examples: int


def program_forward(program: Program) -> Forward:
    """The logits of a causal language model program."""

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return logits_of(program(**model_inputs(program, input_ids, attention_mask)))

    return forward


def model_inputs(program: Program, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Arguments of a causal language model by name; the mask where the model takes one."""
    inputs = {program.signature.inputs[0].name: input_ids}
    if any(leaf.name == "attention_mask" for leaf in program.signature.inputs):
        inputs["attention_mask"] = attention_mask
    return inputs


def logits_of(output: Any) -> Tensor:
    """The logits `[B, T, V]` in a model's output.

    Raises:
        UnsupportedError: the output holds no such tensor.
    """
    logits = output if isinstance(output, Tensor) else None
    if isinstance(output, dict):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        logits = output[0]
    elif logits is None:
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedError(
            "the model gives no logits [batch, sequence, vocabulary], so it is no language model",
            hint="train it with a loop of your own on program.adapter_parameters()",
        )
    return logits


def label_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions and targets of the positions that carry loss: `[n, V]` and `[n]`."""
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORED
    return logits[:, :-1][wanted], targets[wanted]


def evaluate(
    forward: Forward,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    choices: Sequence[int] | None = None,
) -> Metrics:
    """Evaluate on held-out examples, in order, without gradients.

    Args:
        forward: Gives logits; see `program_forward`.
        examples: At least one.
        batch_size: Examples at a time.
        choices: Token ids among which the first predicted token is chosen, for classification by
            label words.
    """
    total_loss, tokens, right = 0.0, 0, 0
    exact, chosen = 0, 0
    chunks = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    with torch.no_grad():
        for chunk in track(chunks, "evaluate"):
            batch = collate(chunk)
            logits = forward(batch.input_ids, batch.attention_mask)
            rows, targets = label_loss(logits, batch)
            total_loss += float(functional.cross_entropy(rows.float(), targets, reduction="sum"))
            hits = rows.argmax(-1) == targets
            tokens, right = tokens + len(targets), right + int(hits.sum())
            counts = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
            for hit, row, target in zip(
                hits.split(counts), rows.split(counts), targets.split(counts), strict=True
            ):
                exact += bool(hit.all())
                if choices is not None:
                    chosen += choices[int(row[0, list(choices)].argmax())] == int(target[0])
    return Metrics(
        loss=total_loss / tokens,
        token_accuracy=right / tokens,
        exact_match=exact / len(examples),
        choice_accuracy=None if choices is None else chosen / len(examples),
        examples=len(examples),
    )

"""Held-out loss and accuracy of a program, an ONNX session or another source of logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.progress import track
from qalora_compile.training.data.example import IGNORED, Batch, Example, collate

Forward = Callable[..., Tensor]
"""(input_ids [B, T], attention_mask [B, T]) → logits [B, T, V], or [B, C] for a classifier.

A model with an encoder gets two more arguments: the encoder's tokens [B, S] and their mask. T is
then the length of the decoder's tokens.
"""


@dataclass(frozen=True)
class Metrics:
    """Held-out figures.

    Attributes:
        loss: Mean cross-entropy, in nats, over the tokens that carry loss.
        token_accuracy: Fraction of these tokens to which the model gives the largest logit.
        exact_match: Fraction of the examples for which this holds for every such token; in a
            classification task, the accuracy.
        choice_accuracy: Fraction of the examples whose first such token is the likeliest of the
            given choices; None if no choices were given.
        examples: Number of examples that were evaluated.
    """

    loss: float
    token_accuracy: float
    exact_match: float
    choice_accuracy: float | None
    examples: int

    def check(self, when: str) -> None:
        """Check that the loss is finite.

        Raises:
            UserInputError: it is not.
        """
        if not math.isfinite(self.loss):
            raise UserInputError(
                f"{when} the held-out loss is {self.loss}",
                hint="lower the learning rate, quantize to more bits, or look for broken examples",
            )


def program_forward(program: Program) -> Forward:
    """A function that computes the logits of a language model or classifier.

    They are computed, and stay, on the device of the program's tensors.
    """

    def forward(input_ids: Tensor, attention_mask: Tensor, *source: Tensor) -> Tensor:
        tensors = chain(program.module.parameters(), program.module.buffers())
        given = [input_ids, attention_mask, *source]
        own = next(tensors, None)
        if own is not None:
            given = [tensor.to(own.device) for tensor in given]
        return rows_of(program(**model_inputs(program, *given)))

    return forward


def rows_of(output: Any) -> Tensor:
    """The logits of either task: `[B, T, V]` for a language model, `[B, C]` for a classifier.

    Raises:
        UnsupportedError: the output holds neither.
    """
    logits = _find_logits(output)
    return logits_of(output) if logits is None or logits.dim() != 2 else logits


def model_inputs(
    program: Program, input_ids: Tensor, attention_mask: Tensor, *source: Tensor
) -> dict[str, Tensor]:
    """The arguments of a language model by name, with the mask if the model takes one.

    Args:
        program: A language model; if it has an encoder, `input_ids` are the decoder's tokens.
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, see `Batch`. The packed form of a program gets a mask
            `[B, 1, T, T]` and the position of each token in its own example instead.
        source: If the model has an encoder: its tokens, `[B, S]`, and their mask.

    Raises:
        PreconditionError: the examples are packed and the program is not in its packed form.
    """
    first = program.signature.inputs[0].name
    inputs = {first: input_ids}
    if source:  # a causal decoder needs no mask for padding on the right
        inputs = {first: source[0], "decoder_input_ids": input_ids}
        attention_mask = source[1]
    leaf = next((i for i in program.signature.inputs if i.name == "attention_mask"), None)
    if leaf is not None and len(leaf.shape) == 4:
        return inputs | packed_inputs(attention_mask)
    if bool((attention_mask > 1).any()):
        raise PreconditionError(
            "the rows hold several examples, and this program would mix them",
            hint="use its packed form: qalora_compile.api.packed_form(program, model)",
        )
    return inputs if leaf is None else inputs | {"attention_mask": attention_mask}


def packed_inputs(owners: Tensor) -> dict[str, Tensor]:
    """The attention mask of packed rows, bool `[B, 1, T, T]`, and the positions, `[B, T]`.

    Args:
        owners: `Batch.attention_mask`: the number of the example of each token. Padding attends to
            padding only, since attention is not defined for a token that attends to nothing.
    """
    size = owners.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=owners.device).tril()
    seen = (owners[:, :, None] == owners[:, None, :]) & before
    return {"attention_mask": seen[:, None], "position_ids": seen.sum(-1) - 1}


def logits_of(output: Any) -> Tensor:
    """The logits `[B, T, V]` in a language model's output.

    Raises:
        UnsupportedError: the output holds no such tensor.
    """
    logits = _find_logits(output)
    if logits is None or logits.dim() != 3:
        raise UnsupportedError(
            "the model gives no logits [batch, sequence, vocabulary]: it is not a language model",
            hint="train it with your own loop over program.adapter_parameters()",
        )
    return logits


def check_logits(output: Any, classes: int | None) -> None:
    """Check that a model gives logits for the task.

    Args:
        output: The output of the model.
        classes: Number of classes of a classification task; None if tokens are predicted.

    Raises:
        UnsupportedError: it gives no logits or those of another task.
    """
    if classes is None:
        logits_of(output)
        return
    logits = _find_logits(output)
    shape = None if logits is None else list(logits.shape)
    if shape is None or len(shape) != 2 or shape[1] != classes:
        raise UnsupportedError(
            f"the model gives no logits [batch, {classes}] for {classes} classes, but {shape}",
            hint="give an encoder of transformers, or a model with a head for these classes",
        )


def _find_logits(output: Any) -> Tensor | None:
    logits = output if isinstance(output, Tensor) else None
    if isinstance(output, dict):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        logits = output[0]
    elif logits is None:
        logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def label_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets of the positions that carry loss: `[n, V]` and `[n]`.

    Args:
        logits: `[B, T, V]`; `[B, C]` in a classification task.
        batch: The batch with the labels.

    Raises:
        UnsupportedError: the task is to predict tokens and the model is a classifier, or reversed.
    """
    if logits.dim() != batch.labels.dim() + 1:
        raise UnsupportedError(
            f"the model gives logits {list(logits.shape)} for labels {list(batch.labels.shape)}",
            hint="use a classifier to learn classes, and a language model to learn tokens",
        )
    if batch.labels.dim() == 1:
        return logits, batch.labels
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
        forward: Computes logits; see `program_forward`.
        examples: At least one example.
        batch_size: Number of examples per batch.
        choices: For classification by label words: the token ids among which the first predicted
            token is chosen.

    Raises:
        UserInputError: there is no example, or none that carries loss.
    """
    total_loss, tokens, right = 0.0, 0, 0
    exact, chosen = 0, 0
    with torch.no_grad():
        for start in track(range(0, len(examples), batch_size), "evaluate"):
            batch = collate(examples[start : start + batch_size])
            logits = forward(batch.input_ids, batch.attention_mask, *batch.source)
            batch = batch.to(logits.device)
            rows, targets = label_loss(logits, batch)
            total_loss += float(functional.cross_entropy(rows.float(), targets, reduction="sum"))
            hits = rows.argmax(-1) == targets
            tokens, right = tokens + len(targets), right + int(hits.sum())
            counts = batch.targets.tolist()
            for hit, row, target in zip(
                hits.split(counts), rows.split(counts), targets.split(counts), strict=True
            ):
                exact += bool(hit.all())
                if choices is not None:
                    chosen += choices[int(row[0, list(choices)].argmax())] == int(target[0])
    if not tokens:
        raise UserInputError("the examples for evaluation hold nothing to predict")
    return Metrics(
        loss=total_loss / tokens,
        token_accuracy=right / tokens,
        exact_match=exact / len(examples),
        choice_accuracy=None if choices is None else chosen / len(examples),
        examples=len(examples),
    )

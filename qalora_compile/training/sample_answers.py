"""A model's answers to a few examples, before and after training, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qalora_compile.ir.program import Program
from qalora_compile.training.data.example import IGNORED, Example, collate
from qalora_compile.training.evaluate import program_forward

_MOST_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """An example as people read it.

    Attributes:
        prompt: The input of the model.
        wanted: The expected answer.
    """

    prompt: str
    wanted: str


def questions(
    examples: Sequence[Example], tokenizer: Any, classes: Sequence[str] = ()
) -> list[Question]:
    """The examples as text, or as token ids if there is no tokenizer."""
    found = []
    for example in examples:
        if example.label is not None:
            shown = example.media.path.name if example.media else _text(example.tokens, tokenizer)
            found.append(Question(shown, classes[example.label]))
            continue
        begin = _begin(example)
        prompt = example.source or example.tokens[:begin]
        wanted = _text(example.tokens[begin : begin + _MOST_TOKENS], tokenizer)
        found.append(Question(_text(prompt, tokenizer), wanted))
    return found


def answers(
    program: Program, examples: Sequence[Example], tokenizer: Any, classes: Sequence[str] = ()
) -> list[str]:
    """The likeliest class, or as many greedily chosen tokens as the expected answer has.

    Every token takes a forward pass over all examples, since there is no cache in training.
    """
    forward = program_forward(program)
    with program.evaluating():
        if examples[0].label is not None:
            batch = collate(examples)
            chosen = forward(batch.input_ids, batch.attention_mask).argmax(-1)
            return [classes[int(index)] for index in chosen]
        begins = [_begin(example) for example in examples]
        rows = [list(e.tokens[:begin]) for e, begin in zip(examples, begins, strict=True)]
        wanted = max(len(e.tokens) - begin for e, begin in zip(examples, begins, strict=True))
        for _ in range(min(wanted, _MOST_TOKENS)):
            given = [
                Example(tuple(row), (IGNORED,) * len(row), e.source)
                for row, e in zip(rows, examples, strict=True)
            ]
            batch = collate(given)
            logits = forward(batch.input_ids, batch.attention_mask, *batch.source)
            last = torch.tensor([len(row) - 1 for row in rows])
            for row, token in zip(rows, logits[range(len(rows)), last].argmax(-1), strict=True):
                row.append(int(token))
    return [
        _text(row[begin : len(example.tokens)], tokenizer)
        for row, begin, example in zip(rows, begins, examples, strict=True)
    ]


def _begin(example: Example) -> int:
    """The first position to predict; in a text without a prompt, its middle."""
    first = next(i for i, label in enumerate(example.labels) if i and label != IGNORED)
    return first if first > 1 or example.source else max(1, len(example.tokens) // 2)


def _text(tokens: Sequence[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

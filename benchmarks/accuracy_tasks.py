"""The two tasks of `benchmarks.accuracy`: a sentence encoder with a head, and a language model.

Both are models of `(input_ids, attention_mask)` that give one vector for each text, `[B, F]`; a
head computes scores of classes from it. The encoder's head is a linear layer that trains along. The
language model needs none: its vector is the logits of the next token, and a class is the first
token of a word.
"""

from __future__ import annotations

import argparse
import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from assets import TOPICS, articles, encoder_path, model_path, reviews


@dataclass(frozen=True)
class Texts:
    """Tokenized texts: ids and mask `[n, T]`, classes `[n]`."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def part(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows, without the columns that are padding in all of them."""
        mask = self.mask[rows]
        used = int(mask.sum(1).max())
        return self.ids[rows][:, :used], mask[:, :used], self.labels[rows]


class Task(ABC):
    """A model to fine-tune, and texts to train it on and to judge it by.

    Attributes:
        targets: Last part of the names of the linear layers that are adapted and quantized.
        train, test: Texts; none is in both.
    """

    targets: tuple[str, ...]
    train: Texts
    test: Texts

    @cached_property
    @abstractmethod
    def original(self) -> nn.Module:
        """The model in float, `(ids, mask)` → `[B, F]`, its own modules under `inner`."""

    def model(self) -> nn.Module:
        """A fresh copy of it."""
        return copy.deepcopy(self.original)

    @abstractmethod
    def head(self) -> nn.Module:
        """From `[B, F]` to scores `[B, C]`; its parameters, where it has any, are trained."""

    @abstractmethod
    def choose(self, scores: Tensor) -> Tensor:
        """The classes that scores `[B, C]` tell of, `[B]`."""


class _Sentences(nn.Module):
    """A sentence encoder: the mean of the last states."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, T]` twice → `[B, 384]`."""
        states = self.inner(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(states.dtype)
        total: Tensor = (states * mask).sum(1)
        return total / mask.sum(1)


class Reviews(Task):
    """all-MiniLM-L6-v2 (22.7 million weights, true float32) judges sentences of film reviews."""

    targets = ("query", "key", "value", "dense")
    _WIDTH = 24
    """Most tokens of a sentence: longer ones are left out, the machine being small."""

    def __init__(self, held_out: int) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(encoder_path(), local_files_only=True)
        sizes = tokenizer([text for text, _ in reviews()]).input_ids
        rows = [r for r, ids in zip(reviews(), sizes, strict=True) if len(ids) <= self._WIDTH]
        self.test, self.train = (
            self._texts(tokenizer, part) for part in (rows[:held_out], rows[held_out:])
        )

    def _texts(self, tokenizer: Any, rows: Sequence[tuple[str, int]]) -> Texts:
        found = tokenizer(
            [text for text, _ in rows],
            padding="max_length",
            max_length=self._WIDTH,
            return_tensors="pt",
        )
        labels = torch.tensor([label for _, label in rows])
        return Texts(found.input_ids, found.attention_mask, labels)

    @cached_property
    def original(self) -> nn.Module:
        """The encoder and its mean."""
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(encoder_path(), local_files_only=True)
        return _Sentences(encoder).eval()

    def head(self) -> nn.Module:
        """Good or bad, by the random state."""
        return nn.Linear(384, 2)

    def choose(self, scores: Tensor) -> Tensor:
        """The larger score."""
        return scores.argmax(-1)


class _NextToken(nn.Module):
    """A language model: the logits of the token that comes next."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, T]` twice → `[B, V]`."""
        found = self.inner(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1
        )
        logits: Tensor = found.logits[:, -1]
        return logits


class Topics(Task):
    """SmolLM2-135M-Instruct names the topic of a news article from its first 32 tokens.

    All texts have one length, so that none is padded. The loss is over the complete vocabulary; for
    the accuracy the five topics stand to choose from.
    """

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    _WIDTH = 32

    def __init__(self, held_out: int) -> None:
        from qalora_compile.capture.load_source import load_source

        source = load_source(str(model_path()))
        self._model, tokenize = source.model, source.tokenizer
        self._choices = torch.tensor([tokenize(f" {topic}").input_ids[0] for topic in TOPICS])
        before, after = tokenize("Article: ").input_ids, tokenize("\nTopic:").input_ids
        rows: dict[tuple[int, ...], int] = {}
        for text, topic in articles():
            ids = tokenize(" ".join(text.split()[: 2 * self._WIDTH])).input_ids[: self._WIDTH]
            if len(ids) == self._WIDTH:  # a beginning that occurs twice counts once
                rows.setdefault((*before, *ids, *after), TOPICS.index(topic))
        ids, labels = torch.tensor(list(rows)), self._choices[torch.tensor(list(rows.values()))]
        texts = Texts(ids, torch.ones_like(ids), labels)
        self.test = Texts(*texts.part(slice(0, held_out)))
        self.train = Texts(*texts.part(slice(held_out, None)))

    @cached_property
    def original(self) -> nn.Module:
        """The language model and its last token."""
        return _NextToken(self._model).eval()

    def head(self) -> nn.Module:
        """None: the logits are the scores."""
        return nn.Identity()

    def choose(self, scores: Tensor) -> Tensor:
        """The likeliest of the five words."""
        return self._choices[scores[:, self._choices].argmax(-1)]


TASKS: dict[str, type[Reviews] | type[Topics]] = {"minilm": Reviews, "smollm2": Topics}


def load_task(options: argparse.Namespace) -> Task:
    """The task that the options name."""
    return TASKS[options.model](options.held_out)

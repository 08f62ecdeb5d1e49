"""The examples of each step: shuffled, by length, or packed; a pure function of the step.

Packing puts several short examples into one row, so that no position is padding. Such rows need the
packed form of a program (`api.packed_form`), in which no token attends to another example and
positions begin at 0 in each example.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from qalora_compile.config.choices import BY_LENGTH
from qalora_compile.errors import UserInputError
from qalora_compile.training.data.example import (
    IGNORED,
    Batch,
    Example,
    Examples,
    collate,
    lengths_of,
)

_POOL = 64
"""Batches whose examples are sorted by length together: more need less padding but less random."""


class Batches:
    """The batches of all steps: `at(index)` depends on data, index, batch size and seed alone.

    Every epoch takes each example at most once. Examples that do not fill a batch are left out;
    they differ from epoch to epoch.

    Args:
        examples: At least one example; `Packed` for packing.
        batch_size: Examples per batch; all of them if there are fewer.
        seed: Seed of the order; any integer.
        by_length: Put examples of similar length into one batch, which needs less padding. The
            order of the batches is still random.
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_size: int, seed: int, by_length: bool = False
    ) -> None:
        if not len(examples):
            raise UserInputError("there are no examples to make batches of")
        self.examples = examples
        self.batch_size, self.seed, self.by_length = batch_size, seed, by_length
        self._size = min(batch_size, len(examples))
        self._epoch: int | None = None
        self._order = torch.empty(0, 0, dtype=torch.int64)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self.examples) // self._size

    def at(self, index: int) -> Batch:
        """The batch of a step."""
        epoch, position = divmod(index, len(self))
        if epoch != self._epoch:
            self._order, self._epoch = self._order_of(epoch), epoch
        chosen = self._order[position].tolist()
        if isinstance(self.examples, Examples):
            return collate(self.examples.take(chosen))
        return collate([self.examples[i] for i in chosen])

    def _order_of(self, epoch: int) -> Tensor:
        """The examples of each batch of an epoch, `[batches, batch size]`."""
        seed = (self.seed * 1_000_003 + epoch) % 2**64  # torch takes 64 bits
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.examples), generator=generator)
        order = order[: len(self) * self._size]  # before sorting, which puts the longest last
        if not self.by_length:
            return order.reshape(-1, self._size)
        lengths = lengths_of(self.examples)
        pools = order.split(_POOL * self._size)
        order = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
        rows = order.reshape(-1, self._size)
        return rows[torch.randperm(len(rows), generator=generator)]


def batch_at(
    examples: Sequence[Example] | Batches, index: int, *, batch_size: int, seed: int
) -> Batch:
    """The batch of a step; `Batches` keep their own arrangement.

    Raises:
        UserInputError: the batches were made for another batch size or seed.
    """
    if not isinstance(examples, Batches):
        return Batches(examples, batch_size=batch_size, seed=seed).at(index)
    made = (examples.batch_size, examples.seed)
    if made != (batch_size, seed):
        raise UserInputError(
            f"the batches are of size {made[0]} and seed {made[1]}, not {batch_size} and {seed}",
            hint="make them with the batch size and seed of the training",
        )
    return examples.at(index)


class Packed(Examples):
    """Rows of at most `max_length` tokens, each a concatenation of complete examples.

    Every example is in exactly one row (best fit, longest first). The rows depend only on the
    lengths.

    Raises:
        UserInputError: there is no example, or one is longer than a row or not a single text.
    """

    def __init__(self, examples: Sequence[Example], max_length: int) -> None:
        if not len(examples):
            raise UserInputError("there are no examples to pack")
        first = examples[0]
        if first.source or first.label is not None or first.rejected is not None:
            raise UserInputError(
                "only the texts of a decoder-only language model can be packed",
                hint=f"use the arrangement {BY_LENGTH}",
            )
        self.examples, self.max_length = examples, max_length
        sizes = lengths_of(examples)
        self.rows = _fit(sizes.tolist(), max_length)
        self._lengths = torch.tensor([int(sizes[row].sum()) for row in self.rows])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, `[n]` int64."""
        return self._lengths

    @property
    def fill(self) -> float:
        """The fraction of all positions, `max_length` per row, that are tokens."""
        return float(self._lengths.sum()) / (len(self.rows) * self.max_length)

    def take(self, indices: Sequence[int]) -> list[Example]:
        """The rows at some positions."""
        return [_join([self.examples[i] for i in self.rows[index]]) for index in indices]


def _fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Rows of indices whose sizes sum to at most `limit`: best fit, longest first."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free space, row), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        if size > limit:
            raise UserInputError(f"example {index + 1} has {size} tokens, and a row has {limit}")
        place = bisect_left(spaces, (size, -1))
        if place == len(spaces):
            rows.append([])
            space, row = limit, len(rows) - 1
        else:
            space, row = spaces.pop(place)
        rows[row].append(index)
        if space > size:
            insort(spaces, (space - size, row))
    return rows


def _join(examples: Sequence[Example]) -> Example:
    """Join examples into one row; the first token of each has no context, so it carries no loss."""
    tokens = [token for example in examples for token in example.tokens]
    labels = [label for example in examples for label in (IGNORED, *example.labels[1:])]
    parts = tuple(len(example.tokens) for example in examples)
    return Example(tuple(tokens), tuple(labels), parts=parts)

"""Which examples a step trains on: shuffled, by length, or packed; a pure function of its number.

Packing lays several short examples into one row, so that no position is padding. A program takes
such rows in its packed form alone (`api.packed_form`): there no token sees another example, and
positions begin at 0 in each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.example import (
    IGNORED,
    Batch,
    Example,
    Examples,
    collate,
    lengths_of,
)

SHUFFLED, BY_LENGTH, PACKED = "shuffled", "by-length", "packed"
ARRANGEMENTS = (SHUFFLED, BY_LENGTH, PACKED)

_POOL = 64
"""Batches whose examples are sorted together by length: more pad less, and are less random."""


class Batches:
    """The batches of all steps: `at(index)` depends on data, index, batch size and seed alone.

    Every epoch takes each example at most once; what does not fill a batch is left out, other
    examples in each epoch.

    Args:
        examples: At least one; `Packed` for packing.
        batch_size: Examples a batch; fewer where there are not as many.
        seed: Of the order; any whole number.
        by_length: Put examples of about one length into one batch, so that little is padded. The
            order of the batches is random all the same.
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_size: int, seed: int, by_length: bool = False
    ) -> None:
        if not len(examples):
            raise UserInputError("there is no example to make batches of")
        self.examples = examples
        self.batch_size, self.seed, self.by_length = batch_size, seed, by_length
        self._size = min(batch_size, len(examples))
        self._epoch: int | None = None
        self._order = torch.empty(0, 0, dtype=torch.int64)

    def __len__(self) -> int:
        """Batches of an epoch."""
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
        order = order[: len(self) * self._size]  # before sorting, or the longest never have a turn
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
    """The batch of a step; `Batches` that are made already keep their own arrangement.

    Raises:
        UserInputError: the batches were made for another batch size or seed.
    """
    if not isinstance(examples, Batches):
        return Batches(examples, batch_size=batch_size, seed=seed).at(index)
    made = (examples.batch_size, examples.seed)
    if made != (batch_size, seed):
        raise UserInputError(
            f"the batches are of size {made[0]} and seed {made[1]}, not {batch_size} and {seed}",
            hint="make them with what is trained with",
        )
    return examples.at(index)


class Packed(Examples):
    """Rows of at most `max_length` tokens, each of whole examples one behind the other.

    Every example is in exactly one row (best fit, longest first); which ones share a row depends on
    lengths alone.

    Raises:
        UserInputError: there is no example, or one is longer than a row or not of one text alone.
    """

    def __init__(self, examples: Sequence[Example], max_length: int) -> None:
        if not len(examples):
            raise UserInputError("there is no example to pack")
        if examples[0].source or examples[0].label is not None:
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
        """Part of the positions of all rows, at `max_length`, that are tokens."""
        return float(self._lengths.sum()) / (len(self.rows) * self.max_length)

    def take(self, indices: Sequence[int]) -> list[Example]:
        """The rows at some positions."""
        return [_join([self.examples[i] for i in self.rows[index]]) for index in indices]


def _fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Rows of positions whose sizes sum to `limit` at most: best fit, longest first."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free space, row), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        if size > limit:
            raise UserInputError(f"example {index + 1} has {size} tokens, a row {limit}")
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
    """Examples in one row. The first token of each is predicted from nothing, so it has no loss."""
    tokens = [token for example in examples for token in example.tokens]
    labels = [label for example in examples for label in (IGNORED, *example.labels[1:])]
    parts = tuple(len(example.tokens) for example in examples)
    return Example(tuple(tokens), tuple(labels), parts=parts)

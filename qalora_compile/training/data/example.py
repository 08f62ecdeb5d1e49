"""Tokenized training examples, and batches of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qalora_compile.errors import UserInputError

IGNORED = -100
"""The label of a position that carries no loss."""


_MASK = "attention_mask"


@dataclass(frozen=True)
class Media:
    """An image or a recording, as a model takes it.

    Attributes:
        path: The file.
        inputs: Input of the model → its value: float32 `[channels, height, width]` of an image,
            `[samples]` or `[frames, bins]` of a recording; and `attention_mask` int64 `[samples]`
            or `[frames]`, if the model takes one.
    """

    path: Path
    inputs: Mapping[str, Tensor]

    @property
    def features(self) -> Tensor:
        """The input that is not the mask."""
        return next(value for name, value in self.inputs.items() if name != _MASK)

    @property
    def mask(self) -> Tensor:
        """The mask; if the model takes none, of a single position."""
        return self.inputs.get(_MASK, torch.ones(1, dtype=torch.int64))


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        tokens: Token ids.
        labels: The token to predict *at* each position, or `IGNORED`; as long as `tokens`. The
            model predicts label t from the tokens before t. Empty if there is a `label`.
        source: Token ids for the encoder, if the model has one; `tokens` are then for the decoder.
        label: The class of the text, in a classification task.
        parts: Lengths of the examples that were packed into this one; empty if it is a single one.
        rejected: The other answer to the same prompt, of a pair of which this one is preferred.
        media: What `label` is the class of, if that is no text; `tokens` are then empty.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    source: tuple[int, ...] = ()
    label: int | None = None
    parts: tuple[int, ...] = ()
    rejected: Example | None = None
    media: Media | None = None

    @property
    def length(self) -> int:
        """How many positions it takes in a batch; of a pair, the longer answer with its prompt.

        An image takes one, a recording those of its samples or frames.
        """
        if self.media is not None:
            features = self.media.features
            return 1 if features.dim() == 3 else len(features)
        other = 0 if self.rejected is None else self.rejected.length
        return max(len(self.tokens), len(self.source), other)

    @property
    def learns(self) -> bool:
        """Whether any position but the first, which has no context, carries loss.

        In a pair, both answers need such a position.
        """
        if self.rejected is not None and not self.rejected.learns:
            return False
        return self.label is not None or any(label != IGNORED for label in self.labels[1:])

    @property
    def answers(self) -> tuple[Example, ...]:
        """Both examples of a pair, the preferred one first, or this one alone."""
        if self.rejected is None:
            return (self,)
        return replace(self, rejected=None), self.rejected

    def check_tokens(self, limit: int, where: str) -> None:
        """Check that a model of `limit` tokens knows every token and every label.

        Args:
            limit: Size of the model's vocabulary.
            where: Place of the example, for the message.

        Raises:
            UserInputError: it does not.
        """
        if self.rejected is not None:
            self.rejected.check_tokens(limit, where)
        learned = [label for label in self.labels if label != IGNORED]
        for kind, values in (("token", (*self.source, *self.tokens)), ("label", learned)):
            odd = [value for value in values if not 0 <= value < limit]
            if odd:
                raise UserInputError(
                    f"{where} holds the {kind} {odd[0]}; the model knows 0 to {limit - 1}",
                    hint="use the tokenizer that belongs to the model",
                )


class Examples(Sequence[Example]):
    """Examples that are produced on demand, with lengths that are known in advance."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """`Example.length` of each, `[n]` int64."""

    @abstractmethod
    def take(self, indices: Sequence[int]) -> list[Example]:
        """The examples at some positions."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        step = 256
        for start in range(0, len(self), step):
            yield from self[start : start + step]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return self.take([range(len(self))[index]])[0]


def lengths_of(examples: Sequence[Example]) -> Tensor:
    """`Example.length` of each, `[n]` int64."""
    if isinstance(examples, Examples):
        return examples.lengths
    return torch.tensor([example.length for example in examples], dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors of B examples.

    Attributes:
        input_ids: `[B, T]` int64; of images and recordings `Media.features` `[B, …]`, float32.
        attention_mask: `[B, T]` int64: 0 for padding, otherwise the number, from 1, of the token's
            example in its row. It exceeds 1 only in packed rows. `[B, 1]` of 1 for images and
            recordings whose model takes no mask.
        labels: `[B, T]` int64, `IGNORED` where there is no loss; `[B]` in a classification task.
        source: Token ids and attention mask `[B, S]` for the encoder, if the model has one.
        pairs: Number of pairs of answers, B / 2: the preferred ones are the first half of the rows,
            the rejected ones the second half; 0 if the rows are no pairs.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    source: tuple[Tensor, ...] = ()
    pairs: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens without padding; only the decoder's, if there is an encoder.

        An image or a recording counts as one.
        """
        if self.input_ids.is_floating_point():
            return len(self.input_ids)
        return int((self.attention_mask != 0).sum())

    @property
    def targets(self) -> Tensor:
        """The number of labels in each row that carry loss, `[B]`."""
        if self.labels.dim() == 1:
            return torch.ones_like(self.labels)
        return (self.labels[:, 1:] != IGNORED).sum(1)

    def to(self, device: torch.device) -> Batch:
        """The batch with all tensors on a device."""
        input_ids, mask, labels = (
            t.to(device) for t in (self.input_ids, self.attention_mask, self.labels)
        )
        return Batch(input_ids, mask, labels, tuple(t.to(device) for t in self.source), self.pairs)


def collate(examples: Sequence[Example]) -> Batch:
    """Right-pad examples to the longest of them."""
    if examples[0].media is not None:
        return _collate_media(examples)
    if examples[0].rejected is not None:
        preferred, rejected = zip(*(example.answers for example in examples), strict=True)
        return replace(collate([*preferred, *rejected]), pairs=len(examples))
    input_ids = _pad([e.tokens for e in examples], 0)
    mask = _pad([_owners(e.parts or (len(e.tokens),)) for e in examples], 0)
    source: tuple[Tensor, ...] = ()
    if examples[0].source:
        rows = [e.source for e in examples]
        source = _pad(rows, 0), _pad([(1,) * len(row) for row in rows], 0)
    if examples[0].label is not None:
        return Batch(input_ids, mask, torch.tensor([e.label for e in examples]), source)
    return Batch(input_ids, mask, _pad([e.labels for e in examples], IGNORED), source)


def _collate_media(examples: Sequence[Example]) -> Batch:
    """Features as one tensor: recordings of different lengths are padded with zeros."""
    media = [example.media for example in examples if example.media is not None]
    features, masks = [each.features for each in media], [each.mask for each in media]
    labels = torch.tensor([example.label for example in examples])
    return Batch(pad_sequence(features, True), pad_sequence(masks, True), labels)


def _owners(parts: Sequence[int]) -> list[int]:
    """For each token, the number of its part, from 1."""
    return [number for number, size in enumerate(parts, start=1) for _ in range(size)]


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows `[B, T]` int64, padded on the right to the longest."""
    values = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row)
    return values

"""Images and recordings with a label, which are read when a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qalora_compile.training.data.example import Example, Examples, Media
from qalora_compile.untrusted.media_processor import MediaProcessor


class MediaExamples(Examples):
    """Examples whose files are read each time they are asked for.

    Args:
        processor: Reads the files.
        paths: The files, which `MediaProcessor.check` has accepted.
        labels: The class of each.
        lengths: `Example.length` of each.
    """

    def __init__(
        self,
        processor: MediaProcessor,
        paths: Sequence[Path],
        labels: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self.processor, self.paths, self.labels = processor, paths, labels
        self._lengths = torch.tensor(lengths, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """The number of samples of each recording, 1 for each image; `[n]` int64."""
        return self._lengths

    def take(self, indices: Sequence[int]) -> list[Example]:
        """The examples at some positions.

        Raises:
            UserInputError: a file cannot be read.
        """
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> Example:
        path = self.paths[index]
        found = {name: torch.from_numpy(v) for name, v in self.processor.read(path).items()}
        return Example((), (), label=self.labels[index], media=Media(path, found))


def unit_of(examples: Sequence[Example]) -> str:
    """What `Batch.tokens` counts: `tokens`, or `examples` for images and recordings."""
    return "examples" if isinstance(examples, MediaExamples) else "tokens"

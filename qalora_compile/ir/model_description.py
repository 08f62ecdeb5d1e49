"""`Description`: what a program does not say of its model, and a checkpoint needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model without its weights: configuration, names of its tensors, tokenizer.

    Attributes:
        config: `config.json`, as it is written beside the weights.
        settings: The same with all defaults filled in.
        shapes: Every parameter and persistent buffer, by the first of its names.
        ties: Further name of a tensor → its first name.
        generation: `generation_config.json`, if there is one.
        tokenizer: Folder with the tokenizer's files, if there is a tokenizer.
        gguf: A GGUF file whose metadata are the model's, if it came from one. A GGUF file gets
            them as they are, its tokenizer among them.
        rotary_frequencies: Of a rotary embedding of type `llama3`: `head / 2` float32 numbers.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None
    tokenizer: Path | None = None
    gguf: Path | None = None
    rotary_frequencies: tuple[float, ...] = ()

    @property
    def architecture(self) -> str:
        """The model's class in transformers."""
        return str((self.config.get("architectures") or ["unknown"])[0])

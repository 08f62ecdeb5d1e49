"""`Description`: the facts about a model that a checkpoint needs and a program does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model without its weights: its configuration, tensor names and tokenizer.

    Attributes:
        config: `config.json`, as it is written next to the weights.
        settings: The same with all defaults filled in.
        shapes: Every parameter and persistent buffer, by the first of its names.
        ties: Further name of a tensor → its first name.
        generation: `generation_config.json`, if there is one.
        tokenizer: Folder with the tokenizer's files, if there is a tokenizer.
        gguf: The GGUF file that the model came from, if any. A GGUF export copies its metadata and
            the tokenizer in them.
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

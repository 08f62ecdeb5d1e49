"""Checks the sizes in a configuration against the tensors of the checkpoint.

A model is built before its weights are read, so that a malicious number in a configuration could
cause ten million layers to be built or huge buffers to be allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import quoted
from qalora_compile.untrusted.gguf_header import Header
from qalora_compile.untrusted.safetensors_header import read_header

MOST_LAYERS, LARGEST_SIZE = 1_000, 1 << 20
"""Limits for a model without weights. Models of 2026 have up to 130 layers and vocabularies of up
to 262,144 tokens."""
_MOST_ENTRIES = 1 << 16
_LAYERS = re.compile(r"(num|n)_?(\w*_)?(layers?|blocks?)|\w+_layers|depths?|block_count")
_SIZES = re.compile(
    r"\w*(_size|_dim|_dims|_rank|_heads|_channels|_experts|_width|_groups)|d_\w+|dim|hidden_dim"
    r"|n_(embd|head|inner|positions|ctx)|num_\w*(heads|experts|groups|labels|buckets)\w*"
    r"|head_count\w*|\w*_length|(max_)?\w*positions?|expert_count"
)
_FREE = re.compile(
    r"max_position_embeddings|original_max_position_embeddings|max_sequence_length|seq_length"
    r"|sliding_window\w*|\w*chunk_size\w*|context_length|max_length|min_length|model_max_length"
    r"|original_context_length|\w*_window_size|max_\w*seq\w*|max_window_layers"
)
"""Lengths of texts, which may exceed the size of every tensor, and the layer at which attention
windows begin, which is after the last layer in small Qwen2 models."""
_NUMBER = re.compile(r"\w*_(theta|eps|epsilon|factor|size|layers|heads)")
_RANGE = re.compile(r"\w*(limit|range|max|min)\w*")
"""Names of values that may be infinite (Mamba's `time_step_limit`)."""
_PACKED, _SMALL = 64, 8192
"""A size may exceed every axis in the files by a factor, because sixteen codes of 2 bits are one
word and parts of a layer may be separate tensors. Small sizes are never refused."""
_LONGEST_TEXT = 1 << 31


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Check that `config.json` describes a model of the size of the folder's files.

    NaN is refused, and infinities are accepted only as ends of ranges.

    Args:
        config: Contents of `config.json`.
        folder: Contains the safetensors, of which only headers are read. Without any, sizes are
            compared with fixed limits.

    Raises:
        UserInputError: a size is negative, not a number, or larger than the files allow, or a file
            is broken.
    """
    shapes = [
        row.shape
        for path in sorted(folder.glob("*.safetensors"))
        for row in read_header(path).values()
    ]
    _check(_numbers(config), shapes, str(folder / "config.json"))


def check_gguf_sizes(header: Header, path: Path) -> None:
    """Check that the metadata of a GGUF file describe a model of the size of its tensors.

    Raises:
        UserInputError: they do not.
    """
    numbers = ((key.rpartition(".")[2], value) for key, value in header.values.items())
    _check(numbers, [row.shape for row in header.tensors.values()], str(path))


def _check(numbers: Iterable[tuple[str, Any]], shapes: list[tuple[int, ...]], where: str) -> None:
    most_layers, largest = MOST_LAYERS, LARGEST_SIZE
    if shapes:
        most_layers = min(MOST_LAYERS, len(shapes))
        longest = max((axis for shape in shapes for axis in shape), default=1)
        largest = max(_SMALL, min(_PACKED * longest, LARGEST_SIZE), longest)
    for name, value in numbers:
        if isinstance(value, bool) and _NUMBER.fullmatch(name):
            raise UserInputError(f"{name} is {value}, which is not a number", where=where)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        infinite = isinstance(value, float) and math.isinf(value)
        ranged = _RANGE.fullmatch(name) is not None
        if (isinstance(value, float) and math.isnan(value)) or (infinite and not ranged):
            raise UserInputError(f"{name} is {value}, which is not a number", where=where)
        limit = _limit(name, most_layers, largest)
        if limit is not None and not 0 <= value <= limit and value != -1:
            raise UserInputError(
                f"{name} is {quoted(value)}, but by the tensors of the checkpoint it is at most "
                f"{limit}",
                where=where,
                hint="the configuration belongs to another model, or was changed",
            )


def _limit(name: str, most_layers: int, largest: int) -> int | None:
    """The limit of a number of this name; None if it has no relation to tensors."""
    if _FREE.fullmatch(name):
        return _LONGEST_TEXT
    if _LAYERS.fullmatch(name):
        return most_layers
    return largest if _SIZES.fullmatch(name) else None


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every plain value of a configuration, with its key."""
    waiting: list[tuple[str, Any]] = list(config.items())
    count = 0
    while waiting:
        name, value = waiting.pop()
        count += 1
        if count > _MOST_ENTRIES:
            return
        if isinstance(value, Mapping):
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        else:
            yield name, value

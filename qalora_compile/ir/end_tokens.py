"""The tokens that end a text, and the places that name each of them.

Four places name them, and they often disagree: a chat model's configuration may hold the base
model's end of text, its tokenizer holds the end of a turn, and training may have taught
another. Every output of this package ends a text at any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GENERATION, CONFIG, TOKENIZER, TRAINING = (
    *("generation_config.json", "config.json"),
    *("tokenizer", "training"),
)
Ends = dict[int, list[str]]
"""Token → the places that name it, in the order in which the places are read."""


def end_tokens(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    taught: Sequence[int] = (),
) -> Ends:
    """The tokens at which a text ends.

    Args:
        config: The model's `config.json`.
        generation: Its `generation_config.json`, or nothing.
        tokenizer: The tokenizer, or None.
        taught: The token that training has taught as the end of an answer.
    """
    found: Ends = {}
    own = None if tokenizer is None else tokenizer.eos_token_id
    for place, value in (
        (GENERATION, generation.get("eos_token_id")),
        (CONFIG, config.get("eos_token_id")),
        (TOKENIZER, own),
        (TRAINING, list(taught)),
    ):
        for token in _tokens(value):
            places = found.setdefault(token, [])
            if place not in places:
                places.append(place)
    return found


def _tokens(value: Any) -> Iterator[int]:
    """The tokens of an entry: a number, a list of them, or nothing."""
    for token in value if isinstance(value, list) else [value]:
        if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            yield token


def with_ends(generation: Mapping[str, Any], ends: Ends) -> dict[str, Any]:
    """The generation settings, changed to end a text at all of the tokens."""
    if not ends:
        return dict(generation)
    tokens = list(ends)
    return {**generation, "eos_token_id": tokens if len(tokens) > 1 else tokens[0]}


def ends_to_json(ends: Ends) -> dict[str, list[str]]:
    """As JSON types."""
    return {str(token): list(places) for token, places in ends.items()}


def ends_from_json(value: Mapping[str, Sequence[str]] | None) -> Ends:
    """Undo `ends_to_json`; empty for a record that an older version wrote."""
    return {int(token): list(places) for token, places in (value or {}).items()}

"""The settings of a run for people: as `report.html` and the model card show them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

_LONGEST = 80
_ROWS = (
    ("bits", "quant", "bits"),
    ("budget", "quant", "budget"),
    ("group size", "quant", "group_size"),
    ("method", "quant", "method"),
    ("zero-points", "quant", "zero_point"),
    ("bits of embeddings", "embeddings", "bits"),
    ("group size of embeddings", "embeddings", "group_size"),
    ("adapters", "adapter", "kind"),
    ("rank", "adapter", "rank"),
    ("alpha", "adapter", "alpha"),
    ("pooling", "adapter", "pooling"),
    ("start of adapters", "adapter", "init"),
    ("adapter dropout", "adapter", "dropout"),
    ("learning rate", "fit", "learning_rate"),
    ("schedule", "fit", "schedule"),
    ("batch size", "fit", "batch_size"),
    ("accumulated batches", "fit", "accumulate"),
    ("steps", "fit", "steps"),
    ("weight decay", "fit", "weight_decay"),
    ("precision", "fit", "precision"),
    ("seed", "fit", "seed"),
    ("tokens of an example, at most", "reading", "seq_len"),
)
"""Name for people, and where a record has the value."""
_INPUTS = (
    *("model", "quantized layers", "adapter parameters", "examples", "read as", "packed"),
    *("classes", "cut to fit"),
)
"""Rows of the summary of a training that say what it was started with."""


def settings_of(record: Mapping[str, Any]) -> dict[str, str]:
    """How the weights of a model were quantized and trained.

    Args:
        record: The content of `run.json` or `qalora.json`, or part of it. What it lacks is left
            out, and so is what is neither a number nor a text.

    Returns:
        Name → value, as text of one line.
    """
    found = {name: _text(_part(record, part).get(field)) for name, part, field in _ROWS}
    return {name: text for name, text in found.items() if text}


def written_by(record: Mapping[str, Any]) -> dict[str, str]:
    """The software that wrote a record, and the date and time now."""
    versions = (f"{name} {_text(v)}" for name, v in _part(record, "versions").items())
    return {"versions": ", ".join(versions), "date": today()}


def facts_of_report(
    facts: Mapping[str, object],
) -> tuple[dict[str, object], dict[str, object]]:
    """The summary of a training, split into what went in and what came out."""
    inputs = {name: value for name, value in facts.items() if name in _INPUTS}
    return inputs, {name: value for name, value in facts.items() if name not in _INPUTS}


def today() -> str:
    """The date and time, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(value.split())[:_LONGEST] if isinstance(value, str) else ""

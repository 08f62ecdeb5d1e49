"""Training examples from JSON lines, and batches of them.

A line is `{"text": …}`, `{"prompt": …, "completion": …}`, `{"messages": [{"role", "content"}, …]}`
or, for models without a tokenizer, `{"input_ids": […], "labels": […]}` (labels optional).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        tokens: Token ids.
        labels: The token to predict *at* each position, or `IGNORED`; as long as `tokens`. The
            model predicts label t from the tokens before t.
        source: Token ids for the encoder of a model that has one; `tokens` are then its decoder's.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    source: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The examples of a file, and what was cut to fit.

    Attributes:
        examples: In file order.
        truncated: How many were longer than the limit and were cut.
        skipped: How many had no token left to learn from (a completion that tokenizes to nothing).
    """

    examples: tuple[Example, ...]
    truncated: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors `[B, T]`: token ids, attention mask, labels.

    Attributes:
        source: Token ids and attention mask `[B, S]` for the encoder of a model that has one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    source: tuple[Tensor, ...] = ()


def load_examples(
    path: str | Path, tokenizer: Any, *, max_length: int, decoder_start: int | None = None
) -> Dataset:
    """Read and tokenize a JSON lines file.

    Prompts carry no loss. An example longer than `max_length` loses its beginning (a prompt) or,
    for plain text, its end; the number cut is in the result.

    Args:
        path: The file.
        tokenizer: Of the model; None where the lines hold token ids.
        max_length: The most tokens of an example (and as many for the encoder).
        decoder_start: The token that the decoder of an encoder-decoder model begins with: prompts
            are then for the encoder, completions for the decoder. None: there is no encoder.

    Raises:
        UserInputError: the file is missing or empty, a line is malformed (its number is named), or
            no example is usable.
    """
    path = Path(path)
    if max_length < 2:
        raise UserInputError(f"max_length is {max_length}", hint="use 2 or more")
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserInputError(
            f"cannot read the data file: {error.strerror}", where=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise UserInputError(f"the data file is not UTF-8: {error}", where=str(path)) from error
    examples, truncated, skipped = [], 0, 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if decoder_start is None:
            example, from_end = _read_line(line, tokenizer, where)
        else:
            example, from_end = _read_pair(line, tokenizer, decoder_start, where), False
        if max(len(example.tokens), len(example.source)) > max_length:
            truncated += 1
            cut = slice(-max_length, None) if from_end else slice(max_length)
            example = Example(example.tokens[cut], example.labels[cut], example.source[cut])
        if all(label == IGNORED for label in example.labels[1:]):
            skipped += 1
            continue
        examples.append(example)
    if not examples:
        raise UserInputError(
            f"the data file has no usable example ({skipped} held nothing to learn)",
            where=str(path),
            hint='write one JSON object a line: {"prompt": "…", "completion": "…"}',
        )
    return Dataset(tuple(examples), truncated, skipped)


def _read_pair(line: str, tokenizer: Any, decoder_start: int, where: str) -> Example:
    """Text for the encoder, and what the decoder makes of it, each as the tokenizer ends it."""
    row = _parse(line, where)
    known = isinstance(row, dict) and {"prompt", "completion"} <= set(row)
    if not known or tokenizer is None:
        raise UserInputError(
            "a model with an encoder learns from text to text",
            where=where,
            hint='use {"prompt": "…", "completion": "…"}, and a model that brings its tokenizer',
        )
    source = _encode(tokenizer, _string(row, "prompt", where))
    target, end = _encode(tokenizer, _string(row, "completion", where)), _end(tokenizer)
    if not source:
        raise UserInputError("the prompt holds no token", where=where)
    if target[-1:] != end:  # not every tokenizer writes it
        target += end
    return Example((decoder_start, *target), (IGNORED, *target), tuple(source))


def _read_line(line: str, tokenizer: Any, where: str) -> tuple[Example, bool]:
    """An example, and whether truncation keeps its end."""
    row = _parse(line, where)
    if isinstance(row, dict):
        if "input_ids" in row:
            return _from_ids(row, where), False
        readers = {"messages": _from_messages, "completion": _from_completion, "text": _from_text}
        for key, reader in readers.items():
            if key in row:
                if tokenizer is None:
                    raise UserInputError(
                        "the model has no tokenizer to read text with",
                        where=where,
                        hint='give token ids: {"input_ids": […]}, or a model folder with tokenizer',
                    )
                return reader(row, tokenizer, where), key != "text"
    raise UserInputError(
        "the line has none of the known forms",
        where=where,
        hint='use {"text"}, {"prompt", "completion"}, {"messages"} or {"input_ids"}',
    )


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserInputError(f"the line is not valid JSON: {error}", where=where) from error


def _from_ids(row: dict[str, Any], where: str) -> Example:
    tokens, labels = row["input_ids"], row.get("labels", row["input_ids"])
    valid = all(
        isinstance(values, list) and all(isinstance(v, int) for v in values)
        for values in (tokens, labels)
    )
    if not valid or len(tokens) != len(labels):
        raise UserInputError(
            "input_ids and labels must be integer lists of one length", where=where
        )
    return Example(tuple(tokens), tuple(labels))


def _from_text(row: dict[str, Any], tokenizer: Any, where: str) -> Example:
    tokens = _encode(tokenizer, _string(row, "text", where)) + _end(tokenizer)
    return Example(tuple(tokens), tuple(tokens))


def _from_completion(row: dict[str, Any], tokenizer: Any, where: str) -> Example:
    prompt = _encode(tokenizer, _string(row, "prompt", where))
    completion = _encode(tokenizer, _string(row, "completion", where), special=False)
    if not completion:
        return Example(tuple(prompt), (IGNORED,) * len(prompt))
    completion = completion + _end(tokenizer)
    return Example((*prompt, *completion), (*[IGNORED] * len(prompt), *completion))


def _from_messages(row: dict[str, Any], tokenizer: Any, where: str) -> Example:
    """Loss on the assistant's turns, found by rendering the template up to each of them."""
    messages = row["messages"]
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
        for m in messages
    )
    if not valid or not messages:
        raise UserInputError("messages must be a list of {role, content}", where=where)
    if not getattr(tokenizer, "chat_template", None):
        raise UserInputError(
            "the tokenizer has no chat template", where=where, hint="use prompt and completion"
        )
    tokens: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], prompt=True)
        after = _render(tokenizer, messages[: index + 1], prompt=False)
        if after[: len(before)] != before or before[: len(tokens)] != tokens:
            raise UserInputError("the chat template rewrites earlier turns", where=where)
        labels += [IGNORED] * (len(before) - len(labels)) + after[len(before) :]
        tokens = after
    if not tokens:
        raise UserInputError("messages has no assistant turn to learn", where=where)
    return Example(tuple(tokens), tuple(labels))


def _render(tokenizer: Any, messages: Sequence[Any], *, prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=prompt
    )
    return _encode(tokenizer, text, special=False)


def _encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special).input_ids)


def _end(tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return [] if end is None else [int(end)]


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UserInputError(f"the field {key!r} is missing or no text", where=where)
    return value


def collate(examples: Sequence[Example]) -> Batch:
    """Right-pad examples to the longest of them."""
    input_ids, attention_mask = _pad([e.tokens for e in examples], 0)
    labels, _ = _pad([e.labels for e in examples], IGNORED)
    source = _pad([e.source for e in examples], 0) if examples[0].source else ()
    return Batch(input_ids, attention_mask, labels, source)


def _pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows `[B, T]` int64, filled on the right to the longest, and the mask of what is theirs."""
    shape = (len(rows), max(map(len, rows)))
    values = torch.full(shape, fill, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return values, mask


def batch_at(examples: Sequence[Example], step: int, *, batch_size: int, seed: int) -> Batch:
    """The batch of a step: epochs are shuffled by (seed, epoch), so the position is just `step`."""
    size = min(batch_size, len(examples))
    per_epoch = max(len(examples) // size, 1)
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    picked = order[position * size : (position + 1) * size]
    return collate([examples[i] for i in picked])

"""The form of a data row, recognised by its fields; a row of two forms is refused.

=============================  =====================================================================
token ids                      `input_ids`, and `labels` if some carry no loss
messages                       `messages`: a list of {role, content}; `tools`
ShareGPT                       `conversations`: a list of {from, value}; `system`, `tools`
prompt and completion          texts, or both lists of messages; `tools`
Alpaca                         `instruction`, `input` if there is one, `output`; `system`, `history`
text                           `text`
text and label                 the same with `label`, in a classification task
image or audio, and label      `image` or `audio`: the path of a file; see `load_media`
prompt, chosen and rejected    texts, or lists of messages, for losses of preferences; `tools`
=============================  =====================================================================

Fields that are null count as missing: tables have every column in every row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.chats import Chat, chat_of, from_sharegpt, tools_of
from qalora_compile.training.data.tokenize import check_characters, common_length
from qalora_compile.untrusted import quoted
from qalora_compile.untrusted.media_processor import MEDIA

TOKEN_IDS, TEXT, LABELLED = "token ids", "text", "text and label"
PAIR, CHAT_PAIR, ALPACA = "prompt and completion", "prompt and completion of messages", "Alpaca"
MESSAGES, SHAREGPT = "messages", "ShareGPT"
PREFERENCE = "prompt, chosen and rejected"
KNOWN = (
    '{"prompt", "completion"}, {"messages"}, {"conversations"}, {"instruction", "output"}, '
    '{"text"}, {"text", "label"}, {"image", "label"}, {"audio", "label"}, {"input_ids"}'
)
_MARKS = ("input_ids", "messages", "conversations", "completion", "instruction", "text")
"""The fields that identify the form of a row."""
_ANSWERS = ("chosen", "rejected")
_FIELDS = {*_MARKS, *_ANSWERS}
_FIELDS |= {"labels", "tools", "prompt", "input", "output", "system", "history", "label", *MEDIA}

Mapped = Mapping[str, str]


@dataclass(frozen=True)
class Form:
    """A row whose form is recognised.

    Attributes:
        name: Name of the form.
        row: The fields that are not null.
        pair: Prompt and completion of a row of two texts.
        chat: The turns of a row of messages. Alpaca rows have both `pair` and `chat`.
    """

    name: str
    row: Mapping[str, Any]
    pair: tuple[str, str] | None = None
    chat: Chat | None = None


def read_mapping(text: str) -> dict[str, str]:
    """Field of a form → field of the data, from `prompt=question,completion=answer`.

    Raises:
        UserInputError: it is malformed, or names a field that no form has.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, field = (each.strip() for each in part.partition("="))
        if not (name and equals and field) or name in found:
            raise UserInputError(
                f"the map {text!r} is malformed",
                hint="give FIELD=COLUMN, …: finetune --map prompt=question,completion=answer",
            )
        if name not in _FIELDS:
            raise UserInputError(
                f"no form has a field {name!r}", hint=f"map to one of {', '.join(sorted(_FIELDS))}"
            )
        found[name] = field
    return found


def fields_of(row: Any, mapping: Mapped | None, where: str) -> dict[str, Any]:
    """The fields of a row that are not null; with a mapping, only those that it names.

    Raises:
        UserInputError: the row is not an object, or lacks a mapped field.
    """
    if not isinstance(row, dict):
        raise _unknown("the line has none of the known forms: it is not a JSON object", where)
    if not mapping:
        return {name: value for name, value in row.items() if value is not None}
    missing = [field for field in mapping.values() if field not in row]
    if missing:
        raise UserInputError(
            f"the line has no field {missing[0]!r} for --map; it has {_names(row)}", where=where
        )
    return {name: row[field] for name, field in mapping.items() if row[field] is not None}


def recognise(fields: Mapping[str, Any], where: str) -> Form:
    """Recognise the form of a row, and check its texts and messages.

    Args:
        fields: See `fields_of`.
        where: File and line.

    Raises:
        UserInputError: it has no known form or two of them, or a field is malformed.
    """
    if fields.get("chat_template_kwargs"):
        raise UserInputError(
            "chat_template_kwargs would change the template's settings, and they are not read",
            where=where,
            hint="leave them out, and set them in the tokenizer's chat template",
        )
    found = [mark for mark in _MARKS if mark in fields]
    if len(found) == 1:
        return _READERS[found[0]](fields, where)
    if found:
        raise _unknown(
            f"the line has {' and '.join(found)}; which one is meant?",
            where,
            "name the fields: --map "
            + ",".join(f"{name}={name}" for name in _together(found[0], fields))
            + "; ",
        )
    pair = set(_ANSWERS) & set(fields)
    kind = " (answers to choose from are not learned)" if pair else ""
    raise _unknown(
        f"the line has none of the known forms, but {_names(fields)}{kind}",
        where,
        "learn to prefer one with --loss dpo or orpo; "
        if pair
        else "name the fields: --map prompt=question,completion=answer; ",
    )


def answers_of(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The preferred and the rejected answer of a row, each as a row of prompt and completion.

    Prompt and answers are texts, or lists of messages. Without a list of messages as the prompt,
    two lists of messages are complete chats, and what they share is the prompt.

    Args:
        fields: See `fields_of`.
        where: File and line.

    Raises:
        UserInputError: an answer is missing, or prompt and answers are of different kinds.
    """
    prompt: Any = fields.get("prompt")
    answers: list[Any] = [fields.get(name) for name in _ANSWERS]
    if all(isinstance(answer, list) for answer in answers):
        if not isinstance(prompt, list):
            size = common_length(answers[0], answers[1])
            prompt, answers = answers[0][:size], [answer[size:] for answer in answers]
    elif not all(isinstance(value, str) for value in (prompt, *answers)):
        raise UserInputError(
            f"the line has no prompt with two answers as texts or messages; it has "
            f"{_names(fields)}",
            where=where,
            hint='a loss of preferences learns from {"prompt": "…", "chosen": "…", '
            '"rejected": "…"}; rename other fields with finetune --map '
            "prompt=…,chosen=…,rejected=…",
        )
    if answers[0] == answers[1]:
        raise UserInputError(
            "the preferred answer is the rejected one", where=where, hint="leave the line out"
        )
    rest = {name: fields[name] for name in ("tools",) if name in fields}
    chosen, rejected = ({"prompt": prompt, "completion": each} | rest for each in answers)
    return chosen, rejected


def class_name(fields: Mapping[str, Any], where: str) -> str:
    """The label of a row of a classification task, as text.

    Raises:
        UserInputError: there is no label, or it is neither a text nor an integer.
    """
    label = fields.get("label")
    if isinstance(label, str) and label:
        check_characters(label, where)
        return label
    if isinstance(label, int):  # also true and false
        return json.dumps(label)
    raise UserInputError(
        f"the line has no label; it has {_names(fields)}",
        where=where,
        hint='a classification task learns from {"text": "…", "label": "…"}; labels are texts or '
        "integers; rename other fields with finetune --map text=…,label=…",
    )


def class_index(fields: Mapping[str, Any], classes: Sequence[str], where: str) -> int:
    """The place of a row's label among the classes.

    Raises:
        UserInputError: there is no label, or it is not among them.
    """
    name = class_name(fields, where)
    if name not in classes:
        raise UserInputError(
            f"the label {name!r} does not occur in the training data",
            where=where,
            hint=f"known: {', '.join(classes)}",
        )
    return classes.index(name)


def labelled_field(fields: Mapping[str, Any]) -> str | None:
    """`text`, `image` or `audio`: what has the label, in a row of a classification task."""
    marks = [mark for mark in _MARKS if mark in fields] or [
        mark for mark in MEDIA if mark in fields
    ]
    single = marks[0] if len(marks) == 1 else None
    return single if "label" in fields and single in (TEXT, *MEDIA) else None


def string(fields: Mapping[str, Any], key: str, where: str) -> str:
    """A field that must be a text.

    Raises:
        UserInputError: it is missing or not a text.
    """
    value = fields.get(key)
    if not isinstance(value, str):
        raise UserInputError(f"the field {key!r} is missing or not a text", where=where)
    return value


def _token_ids(fields: Mapping[str, Any], where: str) -> Form:
    return Form(TOKEN_IDS, fields)


def _text(fields: Mapping[str, Any], where: str) -> Form:
    string(fields, "text", where)
    return Form(TEXT, fields)


def _messages(fields: Mapping[str, Any], where: str) -> Form:
    chat = chat_of(fields["messages"], tools_of(fields, where), where)
    return Form(MESSAGES, fields, chat=chat)


def _conversations(fields: Mapping[str, Any], where: str) -> Form:
    messages = from_sharegpt(fields["conversations"], fields.get("system"), where)
    return Form(SHAREGPT, fields, chat=chat_of(messages, tools_of(fields, where), where))


def _pair(fields: Mapping[str, Any], where: str) -> Form:
    prompt, completion = fields.get("prompt"), fields["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        texts = string(fields, "prompt", where), string(fields, "completion", where)
        return Form(PAIR, fields, pair=texts)
    chat = chat_of([*prompt, *completion], tools_of(fields, where), where, first=len(prompt))
    return Form(CHAT_PAIR, fields, chat=chat)


def _alpaca(fields: Mapping[str, Any], where: str) -> Form:
    """Instruction and input, separated by an empty line, and the output that answers them."""
    question, output = string(fields, "instruction", where), string(fields, "output", where)
    more = fields.get("input", "")
    if not isinstance(more, str):
        raise UserInputError("the field 'input' is not a text", where=where)
    if more:
        question = f"{question}\n\n{more}"
    turns: list[tuple[str, Any]] = []
    if fields.get("system"):
        turns.append(("system", string(fields, "system", where)))
    for earlier in fields.get("history") or []:
        if not (isinstance(earlier, (list, tuple)) and len(earlier) == 2):
            raise UserInputError(
                "history is not a list of [question, answer]", where=where, hint="use messages"
            )
        turns += zip(("user", "assistant"), earlier, strict=True)
    alone = not turns
    turns += [("user", question), ("assistant", output)]
    messages = [{"role": role, "content": content} for role, content in turns]
    chat = chat_of(messages, None, where, first=len(turns) - 1)
    return Form(ALPACA, fields, pair=(f"{question}\n\n", output) if alone else None, chat=chat)


_READERS = {
    "input_ids": _token_ids,
    "messages": _messages,
    "conversations": _conversations,
    "completion": _pair,
    "instruction": _alpaca,
    "text": _text,
}


def _together(mark: str, fields: Mapping[str, Any]) -> list[str]:
    """The identifying field of a form and those of its other fields that are present."""
    more = {"completion": ("prompt",), "instruction": ("input", "output")}.get(mark, ())
    return [mark, *(name for name in more if name in fields)]


def _names(fields: Mapping[str, Any]) -> str:
    return "the fields " + quoted(list(fields), 200)


def _unknown(what: str, where: str, hint: str = "") -> UserInputError:
    return UserInputError(what, where=where, hint=f"{hint}the known forms are {KNOWN}")

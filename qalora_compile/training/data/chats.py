"""Chats in the form that chat templates take, and the parts of the rendered text that are learned.

Messages are those of the OpenAI interface and of transformers: `role`, `content` (a text, null, or
a list of parts), `tool_calls`. The template also gets all other fields of a message unchanged, such
as `reasoning_content`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.tokenize import Span, Texts, common_length
from qalora_compile.untrusted import parse_json, quoted
from qalora_compile.untrusted.tokenizer import render_chat

_ASSISTANT = "assistant"
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": _ASSISTANT,
    "chatgpt": _ASSISTANT,
    "assistant": _ASSISTANT,
    "model": _ASSISTANT,
    "function_call": _ASSISTANT,
    "observation": "tool",
    "tool": "tool",
}
"""ShareGPT's names of speakers → roles."""
_PROBES = ("qalora first part", "qalora second part")

REWRITTEN = "chats whose earlier answers the template rewrites: the others are learned"
LEFT_OUT = "chats of which the template leaves out a part of an answer (its reasoning?)"
OPENED = "answers without what the generation prompt opens for them (a think tag)"


@dataclass(frozen=True)
class Chat:
    """The turns of a chat.

    Attributes:
        messages: Messages in the form that the template takes.
        tools: Descriptions of the functions that may be called, or None.
        first: Index of the first message that is learned, if it is the assistant's.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    first: int = 0

    @property
    def answers(self) -> list[int]:
        """The indices of the messages that are learned."""
        every = enumerate(self.messages)
        return [i for i, m in every if i >= self.first and m["role"] == _ASSISTANT]


@dataclass(frozen=True)
class Rendered:
    """The text of a chat.

    Attributes:
        text: The text up to the last answer.
        spans: The ranges of characters that are learned, in order.
        remarks: How the template changes the chat.
    """

    text: str
    spans: tuple[Span, ...]
    remarks: tuple[str, ...] = ()


def chat_of(value: Any, tools: Any, where: str, *, first: int = 0) -> Chat:
    """A chat from its messages.

    Raises:
        UserInputError: they are not a list of {role, content}, begin with the assistant, or hold
            no answer to learn.
    """
    if not isinstance(value, list) or not value:
        raise UserInputError("messages must be a list of {role, content}", where=where)
    chat = Chat(tuple(_message(each, where) for each in value), tools, first)
    if chat.messages[0]["role"] == _ASSISTANT:
        raise UserInputError(
            "the chat begins with the assistant, so there is no question",
            where=where,
            hint="let it begin with a turn of the user",
        )
    if not chat.answers:
        raise UserInputError("messages have no assistant turn to learn", where=where)
    return chat


def tools_of(fields: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...] | None:
    """The `tools` of a row: a list of objects or its JSON text; None if there are none.

    Raises:
        UserInputError: they are something else.
    """
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, where, what="the field 'tools'", finite=True) if tools else None
    if not tools:
        return None  # some templates mention tools even if the list is empty
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tuple(tools)
    raise UserInputError("tools must be a list of objects, or its JSON text", where=where)


def from_sharegpt(value: Any, system: Any, where: str) -> list[dict[str, Any]]:
    """Messages from a list of {from, value}; lists of {role, content} stay as they are.

    Raises:
        UserInputError: it is not such a list, or a speaker is unknown.
    """
    turns = value if isinstance(value, list) else []
    named = [isinstance(turn, dict) and {"from", "value"} <= set(turn) for turn in turns]
    roles = [isinstance(turn, dict) and "role" in turn for turn in turns]
    if not turns or not (all(named) or all(roles)):
        raise UserInputError("conversations must be a list of {from, value}", where=where)
    if system is not None and not isinstance(system, str):
        raise UserInputError("the field 'system' is not a text", where=where)
    messages = [{"role": "system", "content": system}] if system else []
    return messages + (turns if all(roles) else [_turn(turn, where) for turn in turns])


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise UserInputError(
            f"the speaker {quoted(speaker)} is unknown",
            where=where,
            hint=f"from is one of {', '.join(_ROLES)}",
        )
    if speaker != "function_call":
        return {"role": _ROLES[speaker], "content": value}
    called = parse_json(str(value), where, what="the function_call", finite=True)
    calls = called if isinstance(called, list) else [called]
    return {"role": _ASSISTANT, "content": None, "tool_calls": calls}


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message in the form that chat templates expect, without fields that are null."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise UserInputError("messages must be a list of {role, content}", where=where)
    message = {name: each for name, each in value.items() if each is not None or name == "content"}
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _parts(content, where)
    elif content is None and not message.get("tool_calls"):
        raise UserInputError(
            f"a message of {quoted(message['role'])} has no content and calls no tool", where=where
        )
    elif content is not None and not isinstance(content, str):
        raise UserInputError(
            "messages must be a list of {role, content}: a content is not a text", where=where
        )
    return message


def _parts(content: list[Any], where: str) -> str | list[dict[str, Any]]:
    """The text of a single part, or the list of several parts, which must all be texts."""
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise UserInputError(
                f"a part of a content is {quoted(kind)}, not a text: only texts are learned",
                where=where,
                hint='use {"type": "text", "text": "…"}',
            )
    texts = [str(part["text"]) for part in content]
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects; OpenAI writes them as JSON text."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise UserInputError("tool_calls must be a list of objects", where=where)
    found = []
    for call in value:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise UserInputError("a tool call does not name a function", where=where)
        given = inner.get("arguments", {})
        if isinstance(given, str):
            what = "the arguments of a tool call"
            given = parse_json(given, where, what=what, finite=True) if given else {}
        function = {**inner, "arguments": given}
        found.append(
            {**call, "function": function} if "function" in call else {"function": function}
        )
    return [{"type": "function", **call} for call in found]


class ChatReader:
    """Renders chats with a tokenizer's template, and finds the learned parts of the text.

    Args:
        texts: The tokenizer.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._styles: dict[str, bool] = {}

    def render(self, chat: Chat, where: str) -> Rendered:
        """The text up to the end of the last answer, and the positions of the answers in it.

        An answer is learned only if rendering the messages before it, and those up to it, gives
        prefixes of the text: then generation begins with the same prompt as training.

        Raises:
            UserInputError: there is no template, it does not take the messages, or the last answer
                cannot be found in its output.
        """
        if not getattr(self._texts.tokenizer, "chat_template", None):
            raise UserInputError(
                "the tokenizer has no chat template", where=where, hint="use prompt and completion"
            )
        chat = self._in_style(chat)
        try:
            return self._render(chat, where)
        except UserInputError:
            written = _with_written_arguments(chat)
            if written is None:
                raise
            try:  # DeepSeek's templates copy the arguments of a call, which must be text
                return self._render(written, where)
            except UserInputError:
                pass
            raise

    def _render(self, chat: Chat, where: str) -> Rendered:
        text = self._text(chat, chat.answers[-1] + 1, where)
        spans: list[Span] = []
        remarks: dict[str, None] = {}
        for index in chat.answers:
            after = self._text(chat, index + 1, where)
            begin = self._begin(chat, index, after, where) if text.startswith(after) else None
            if begin is None:
                remarks[REWRITTEN] = None
                continue
            spans.append((begin[0], len(after)))
            remarks |= dict.fromkeys(begin[1])
        if not spans or spans[-1] != (spans[-1][0], len(text)):
            raise UserInputError(
                "the chat template rewrites earlier turns, even the last question", where=where
            )
        if spans[-1][0] == len(text):
            raise UserInputError("the chat template leaves out the last answer", where=where)
        if any(_is_cut(chat.messages[index], text) for index in chat.answers):
            remarks[LEFT_OUT] = None
        return Rendered(text, tuple(spans), tuple(remarks))

    def _begin(
        self, chat: Chat, index: int, after: str, where: str
    ) -> tuple[int, tuple[str, ...]] | None:
        """The start of an answer in the text up to its end, with remarks; None if it is not there.

        DeepSeek-R1's generation prompt ends with a think tag that no answer in the data has. As in
        TRL, the answer is learned from the first token on in which the two differ.
        """
        before = self._text(chat, index, where, prompt=True)
        if after.startswith(before):
            return len(before), ()
        history = self._text(chat, index, where)
        if not after.startswith(history) or not before.startswith(history):
            return None
        opening, answer = before[len(history) :], after[len(history) :]
        first, second = (self._texts.plain(each, where) for each in (opening, answer))
        most, same = common_length(first, second), common_length(opening, answer)
        # A tag that is one token differs from another tag entirely, even if they share letters.
        while same and len(self._texts.plain(opening[:same], where)) > most:
            same -= 1
        return len(history) + same, (OPENED,)

    def _text(self, chat: Chat, size: int, where: str, *, prompt: bool = False) -> str:
        """The text of the first `size` messages; with `prompt`, also the start of an answer."""
        return render_chat(
            self._texts.tokenizer,
            chat.messages[:size],
            prompt=prompt,
            where=where,
            tools=chat.tools,
        )

    def _in_style(self, chat: Chat) -> Chat:
        """The chat with contents of the kind that the template takes: texts or lists of parts.

        If it takes texts only, several parts are joined by line breaks; if it takes parts only, a
        text becomes a part.
        """
        parted = any(isinstance(m.get("content"), list) for m in chat.messages)
        if not self._writes("text") and self._writes("parts"):
            change = _as_parts
        elif parted and not self._writes("parts"):
            change = _joined
        else:
            return chat
        messages = tuple({**m, "content": change(m.get("content"))} for m in chat.messages)
        return Chat(messages, chat.tools, chat.first)

    def _writes(self, style: str) -> bool:
        """Whether the template renders contents that are texts, or parts; tried once."""
        if style not in self._styles:
            parts = [{"type": "text", "text": probe} for probe in _PROBES]
            content: Any = parts if style == "parts" else " ".join(_PROBES)
            message = {"role": "user", "content": content}
            try:
                text = render_chat(self._texts.tokenizer, [message], prompt=True, where="a trial")
            except UserInputError:
                text = ""
            known = all(text.count(probe) == 1 for probe in _PROBES)
            self._styles[style] = known and "'type'" not in text and '"type"' not in text
        return self._styles[style]


def _joined(content: Any) -> Any:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_written_arguments(chat: Chat) -> Chat | None:
    """The chat with the arguments of tool calls as JSON texts; None if there are no calls.

    Null contents become empty ones, since transformers hides null from the template.
    """
    if not any(message.get("tool_calls") for message in chat.messages):
        return None

    def written(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    messages = tuple(
        {
            **m,
            "content": m.get("content") or "",
            "tool_calls": [written(call) for call in m["tool_calls"]],
        }
        if m.get("tool_calls")
        else m
        for m in chat.messages
    )
    return Chat(messages, chat.tools, chat.first)


def _is_cut(message: Mapping[str, Any], text: str) -> bool:
    """Whether the template left out a part of an answer."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [p["text"] for p in content or ()]
    return any(part.strip() not in text for part in parts)

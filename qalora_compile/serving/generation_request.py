"""Requests of `/v1/chat/completions` and `/v1/completions`, checked, as orders."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora_compile.errors import QaloraError
from qalora_compile.runtime.language_model import Sampling
from qalora_compile.serving.api_errors import ApiError, of_package, refused
from qalora_compile.serving.fields import Fields, inputs, text
from qalora_compile.serving.job import Order
from qalora_compile.serving.limits import Limits
from qalora_compile.serving.text_model import TextModel

_COMMON = {
    *("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream"),
    *("stream_options", "logprobs", "n"),
}
_CHAT = frozenset(_COMMON | {"messages", "max_completion_tokens", "top_logprobs"})
_TEXT = frozenset(_COMMON | {"prompt"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "prompt_cache_key"), ()),
}
_NEUTRAL_CHAT = _NEUTRAL | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_NEUTRAL_TEXT = _NEUTRAL | {"echo": (False,), "best_of": (1,), "suffix": ("",)}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_MOST_STOPS, _MOST_TOP, _MOST_CHOICES, _MOST_MESSAGES = 16, 20, 16, 1000
_DEFAULT_TOKENS = 16
"""New tokens of `/v1/completions` if a request does not say, as OpenAI has it."""
_SEEDS = 1 << 63


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request that was checked.

    Attributes:
        orders: The texts to generate, one for each choice.
        stream: Whether pieces are sent as they are generated.
        usage: Whether a stream ends with the numbers of tokens.
        prompt_tokens: Tokens of all prompts, each counted once.
    """

    orders: tuple[Order, ...]
    stream: bool
    usage: bool
    prompt_tokens: int


def chat_request(
    body: Mapping[str, Any], model: TextModel, ends: frozenset[int], limits: Limits
) -> GenerationRequest:
    """A request of `/v1/chat/completions`.

    Raises:
        ApiError: it is malformed, too long, or needs what is not supported.
    """
    fields = Fields(body, _CHAT, _NEUTRAL_CHAT)
    messages = _messages(fields.get("messages"))
    top = fields.integer("top_logprobs", 0, _MOST_TOP)
    if fields.flag("logprobs"):
        top = top or 0
    elif top is not None:
        raise refused("top_logprobs needs logprobs true", "top_logprobs")
    wanted = fields.integer("max_completion_tokens", 1, limits.max_tokens)
    wanted = wanted or fields.integer("max_tokens", 1, limits.max_tokens)
    try:
        prompt = model.chat_tokens(messages)
    except QaloraError as error:
        raise of_package(error) from error
    return _request(fields, model, [prompt], wanted, top, ends, limits)


def text_request(
    body: Mapping[str, Any], model: TextModel, vocabulary: int, limits: Limits
) -> GenerationRequest:
    """A request of `/v1/completions`.

    Raises:
        ApiError: it is malformed, too long, or needs what is not supported.
    """
    fields = Fields(body, _TEXT, _NEUTRAL_TEXT)
    given = inputs(fields.get("prompt"), "prompt", vocabulary, limits.max_inputs)
    top = fields.integer("logprobs", 0, _MOST_TOP)
    wanted = fields.integer("max_tokens", 1, limits.max_tokens)
    wanted = wanted or min(_DEFAULT_TOKENS, limits.max_tokens)
    try:
        prompts = [each if isinstance(each, list) else model.encode(each) for each in given]
    except QaloraError as error:
        raise of_package(error) from error
    return _request(fields, model, prompts, wanted, top, model.ends, limits)


def _request(
    fields: Fields,
    model: TextModel,
    prompts: list[list[int]],
    wanted: int | None,
    top: int | None,
    ends: frozenset[int],
    limits: Limits,
) -> GenerationRequest:
    sampling = _sampling(fields, model.sampling)
    stop = fields.strings("stop", _MOST_STOPS)
    choices = fields.integer("n", 1, _MOST_CHOICES) or 1
    orders: list[Order] = []
    for prompt in prompts:
        count = _room(model, prompt, wanted, limits)
        for _ in range(choices):
            own = dataclasses.replace(sampling, seed=sampling.seed + len(orders))
            orders.append(
                Order(
                    prompt=prompt,
                    max_tokens=count,
                    ends=ends,
                    stop=stop,
                    sampling=own,
                    logprobs=top,
                )
            )
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise refused("stream_options must be an object", "stream_options")
    return GenerationRequest(
        orders=tuple(orders),
        stream=fields.flag("stream"),
        usage=Fields(options or {}, frozenset({"include_usage"}), {"include_obfuscation": ()}).flag(
            "include_usage"
        ),
        prompt_tokens=sum(map(len, prompts)),
    )


def _room(model: TextModel, prompt: list[int], wanted: int | None, limits: Limits) -> int:
    if not prompt:
        raise refused("the prompt has no tokens", "prompt")
    try:
        return min(model.room(len(prompt), wanted), limits.max_tokens)
    except QaloraError as error:
        raise of_package(error, code="context_length_exceeded") from error


def _sampling(fields: Fields, known: Sampling) -> Sampling:
    """As the request says; where it does not, as the folder's generation settings have it."""
    seed = fields.integer("seed", -_SEEDS, _SEEDS - 1)
    given = {
        "temperature": fields.number("temperature", 0.0, 2.0),
        "top_p": fields.number("top_p", 0.0, 1.0),
        "top_k": fields.integer("top_k", 0, 1 << 31),
    }
    if given["top_p"] == 0.0:  # OpenAI takes it as the likeliest token alone
        given |= {"top_p": None, "top_k": 1}
    chosen = {name: value for name, value in given.items() if value is not None}
    number = secrets.randbits(62) if seed is None else seed % _SEEDS
    return dataclasses.replace(known, **chosen, seed=number)  # type: ignore[arg-type]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_MESSAGES:
        raise refused(f"messages must be a list of 1 to {_MOST_MESSAGES} messages", "messages")
    return [_message(each) for each in value]


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise refused("a message must be an object with role and content", "messages")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise refused(f"the role of a message must be one of {', '.join(_ROLES)}", "messages")
    if value.get("tool_calls"):
        raise refused("tool calls are not supported", "messages")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    return {"role": _ROLES[role], "content": text(content, "messages", empty=True)}


def _part(value: Any) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise ApiError(400, "only parts of type text are supported", param="messages")
    return text(value.get("text"), "messages", empty=True)

"""Chats by templates in use, held against what TRL makes of the same messages."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.chats import LEFT_OUT, OPENED, REWRITTEN
from qalora_compile.training.data.example import IGNORED
from qalora_compile.training.data.parse_line import LineReader, Reading
from tests.training.test_completions import byte_level

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
CHAT = [QUESTION, ANSWER, {"role": "user", "content": "And 3?"}, {**ANSWER, "content": "Six."}]
CALL: dict[str, Any] = {"name": "add", "arguments": {"a": 2, "b": 2}}
CALLED: list[dict[str, Any]] = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "name": "add", "content": "4"},
    ANSWER,
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}


@cache
def words(template: str) -> Any:
    """A tokenizer of texts as they are, with one of the templates that TRL knows models by."""
    made = byte_level(prefix=False)
    made.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>")
    if not template:
        return made
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text("utf-8")
    return made


def read(template: str, **row: Any) -> Reading:
    return LineReader(tokenizer=words(template), max_length=10_000).read(row, "here")


def learned(reading: Reading, template: str) -> list[str]:
    """The text of each run of tokens that carries loss."""
    made, found, run = words(template), [], []
    pairs = zip((*reading.example.tokens, 0), (*reading.example.labels, IGNORED), strict=True)
    for token, label in pairs:
        if label != IGNORED:
            run.append(token)
        elif run:
            found.append(made.decode(run))
            run = []
    return found


NATURAL = [
    "cohere", "gemma", "gemma3", "glm4moe", "lfm2", "llama3_1", "qwen2_5", "qwen3_instruct_2507",
]  # fmt: skip
LAST_ALONE = ["qwen3", "gptoss", "phi3_5", "qwen3_6"]
OPENING = ["deepseekv3", "deepseek_r1_distill"]
"""Their generation prompt ends in a think tag."""


@pytest.mark.parametrize("template", [*NATURAL, *LAST_ALONE, *OPENING])
def test_the_last_answer_is_learned_as_trl_learns_it(template: str) -> None:
    pair = {"prompt": CHAT[:-1], "completion": CHAT[-1:]}
    wanted = trl.data_utils.apply_chat_template(pair, words(template))
    for row in ({"messages": CHAT}, pair):
        reading = read(template, **row)
        assert learned(reading, template)[-1] == wanted["completion"]
        text = words(template).decode(reading.example.tokens)
        assert text == wanted["prompt"] + wanted["completion"]
    assert len(learned(reading, template)) == 1  # of a prompt nothing is learned


@pytest.mark.parametrize("template", [*NATURAL, *OPENING])
def test_every_answer_is_learned(template: str) -> None:
    reading = read(template, messages=CHAT)
    first, second = learned(reading, template)
    assert ("It is 4." in first) and ("Six." in second)
    assert reading.remarks == ((OPENED,) if template in OPENING else ())


@pytest.mark.parametrize("template", LAST_ALONE)
def test_a_template_that_rewrites_earlier_answers_teaches_the_last(template: str) -> None:
    reading = read(template, messages=CHAT)
    (only,) = learned(reading, template)
    assert "Six." in only and "4" not in only
    assert reading.remarks == (REWRITTEN,)


def test_reasoning_that_a_template_leaves_out_is_said() -> None:
    answer = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."}
    reading = read("deepseekv3", messages=[QUESTION, answer])
    assert LEFT_OUT in reading.remarks
    kept = read("qwen3", messages=[QUESTION, answer])
    assert kept.remarks == ()
    assert learned(kept, "qwen3") == [f"{answer['content']}<|im_end|>\n"]
    apart = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."}
    assert read("qwen3", messages=[QUESTION, apart]).example == kept.example


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1", "glm4moe", "deepseekv3"])
def test_a_tool_call_is_learned_with_its_arguments(template: str) -> None:
    """OpenAI writes the arguments as a text, transformers' templates take an object."""
    reading = read(template, messages=CALLED, tools=[TOOL])
    found = learned(reading, template)
    assert "It is 4." in found[-1] and "4</tool" not in "".join(found)
    if template == "qwen3":  # an empty think block stands in the last turn alone
        assert len(found) == 1 and REWRITTEN in reading.remarks
        call = read(template, messages=CALLED[:2], tools=[TOOL])
        assert '{"name": "add", "arguments": {"a": 2, "b": 2}}' in learned(call, template)[0]
    else:
        assert len(found) == 2 and ('"a": 2' in found[0] or "<arg_value>2" in found[0])
    text = words(template).decode(reading.example.tokens)
    assert ("The sum of two numbers." in text) == (template != "deepseekv3")  # it knows no tools
    written = {**CALL, "arguments": '{"a": 2, "b": 2}'}
    as_text = [CALLED[0], {**CALLED[1], "tool_calls": [{"function": written}]}, *CALLED[2:]]
    assert read(template, messages=as_text, tools=json.dumps([TOOL])) == reading


def test_an_empty_list_of_tools_is_none() -> None:
    assert read("qwen3", messages=CHAT, tools=[]) == read("qwen3", messages=CHAT)


@pytest.mark.parametrize("template", ["qwen2_5", "gemma3", "smolvlm"])
def test_contents_of_parts_are_texts(template: str) -> None:
    """Of templates that know texts alone, both, and parts alone."""
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]
    one = [{"type": "text", "text": "It is 4."}]
    messages = [{**QUESTION, "content": "What is\n2 + 2?"}, ANSWER]
    reading = read(template, messages=[{**QUESTION, "content": parts}, {**ANSWER, "content": one}])
    text = words(template).decode(reading.example.tokens)
    if template == "qwen2_5":
        assert reading == read(template, messages=messages)
    else:
        native = [
            {**m, "content": c} for m, c in zip((QUESTION, ANSWER), (parts, one), strict=True)
        ]
        made = words(template).apply_chat_template(native, tokenize=False)
        assert text == made
    assert "It is 4." in learned(reading, template)[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a picture": (
        {"messages": [{**QUESTION, "content": [{"type": "image", "url": "a.png"}]}, ANSWER]},
        "'image', not a text: only texts are learned",
    ),
    "nothing said": (
        {"messages": [QUESTION, {"role": "assistant", "content": None}]},
        "no content and calls no tool",
    ),
    "a call of nothing": (
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "does not name a function",
    ),
    "arguments that are no JSON": (
        {
            "messages": [
                QUESTION,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "a", "arguments": "{"}}],
                },
            ]
        },
        "not valid JSON",
    ),
    "tools that are a number": ({"messages": CHAT, "tools": 3}, "tools must be a list"),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "the speaker 'narrator' is unknown",
    ),
    "a prompt of both kinds": ({"prompt": "a", "completion": [ANSWER]}, "'completion' is missing"),
    "settings of the template": (
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_malformed_chat_is_refused(kind: str) -> None:
    row, message = REFUSED[kind]
    with pytest.raises(UserInputError, match=message) as caught:
        read("qwen3", **row)
    assert caught.value.where == "here"


def test_sharegpt_is_the_chat_that_it_spells() -> None:
    """Held against TRL's own conversion, with the names of speakers that the data have."""
    turns = [{"from": m["role"], "value": m["content"]} for m in CHAT]
    converted = trl.data_utils.maybe_convert_to_chatml({"conversations": [dict(t) for t in turns]})
    wanted = read("qwen2_5", messages=converted["messages"])
    reading = read("qwen2_5", conversations=turns)
    assert (reading.example, reading.form) == (wanted.example, "ShareGPT")
    named = [{**t, "from": {"user": "human", "assistant": "gpt"}[t["from"]]} for t in turns]
    assert read("qwen2_5", conversations=named).example == wanted.example
    system = {"role": "system", "content": "Be brief."}
    assert (
        read("qwen2_5", conversations=named, system="Be brief.").example
        == read("qwen2_5", messages=[system, *CHAT]).example
    )
    called = [
        {"from": "human", "value": QUESTION["content"]},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": ANSWER["content"]},
    ]
    own = read("qwen2_5", messages=CALLED, tools=[TOOL])
    assert read("qwen2_5", conversations=called, tools=[TOOL]).example == own.example


def test_alpaca_is_a_chat_where_there_is_a_template() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    asked = [{"role": "user", "content": "Add.\n\n2 and 2"}, {"role": "assistant", "content": "4"}]
    reading = read("qwen2_5", **row)
    assert (reading.example, reading.form) == (read("qwen2_5", messages=asked).example, "Alpaca")
    reader = LineReader(tokenizer=words(""), max_length=100)
    pair = {"prompt": "Add.\n\n2 and 2\n\n", "completion": "4"}
    assert reader.read(row, "here").example == reader.read(pair, "here").example
    with pytest.raises(UserInputError, match="no chat template"):
        reader.read({**row, "history": [["a", "b"]]}, "here")
    earlier = {**row, "input": "", "history": [["Hello", "Hi"]], "system": "Be brief."}
    assert len(learned(read("qwen2_5", **earlier), "qwen2_5")) == 1

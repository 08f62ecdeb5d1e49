"""Tokenizers without their code, chat templates within limits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import tokenizer as module
from qalora_compile.untrusted.tokenizer import has_tokenizer, load_tokenizer, render_chat

MESSAGES = [{"role": "user", "content": "Hello [/red]"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    fast.save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def change(folder: Path, **values: Any) -> None:
    """Change tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def with_template(folder: Path, template: str) -> Any:
    """The tokenizer with a chat template."""
    loaded = load_tokenizer(folder)
    loaded.chat_template = template
    return loaded


def test_a_tokenizer_is_loaded(folder: Path, tmp_path: Path) -> None:
    assert has_tokenizer(folder)
    assert load_tokenizer(folder)("a a").input_ids == [2, 2]
    assert load_tokenizer(tmp_path) is None


def test_code_in_the_folder_is_never_run_and_never_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n", "utf-8")

    def ask(*_: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", ask)
    change(folder, auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="T")
    with pytest.raises(UserInputError, match="cannot load the tokenizer"):
        load_tokenizer(folder)
    change(folder, tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(folder)("a").input_ids == [2]  # a class of transformers' does
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"type": "Nothing"}}'),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}'),
        ("tokenizer_config.json", b"[" * 10_000),
        ("special_tokens_map.json", b'{"eos_token": {"content": 3}}'),
    ],
)
def test_broken_files_are_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserInputError):
        load_tokenizer(folder)


def test_a_chat_is_rendered(folder: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}>{% endif %}"
    loaded = with_template(folder, template)
    assert render_chat(loaded, MESSAGES, prompt=False, where="x") == "<user>Hello [/red]"
    assert render_chat(loaded, MESSAGES, prompt=True, where="x") == "<user>Hello [/red]>"


HOSTILE = {
    "an escape": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "an error of its own": "{{ raise_exception('no') }}",
    "no template": "{% for %}",
    "a large range": "{% for i in range(10000000) %}x{% endfor %}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a long text": "{{ ('a' * 20000000000) | length }}",
    "a change of what it is given": "{{ messages.append(1) }}",
    "a number in a message": "{{ messages[0].content + 1 }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_refused(folder: Path, kind: str) -> None:
    with pytest.raises(UserInputError, match="the chat template"):
        render_chat(with_template(folder, HOSTILE[kind]), MESSAGES, prompt=False, where="x")


LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"


@pytest.mark.parametrize(
    ("template", "match"), [(LOOPS, "more than 1 s"), (DOUBLING + "{% endfor %}", "64 MiB")]
)
def test_a_template_that_takes_too_much_is_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, template: str, match: str
) -> None:
    monkeypatch.setattr(module, "RENDER_SECONDS", 1.0)
    monkeypatch.setattr(module, "RENDER_BYTES", 64 << 20)
    begin = time.monotonic()
    with pytest.raises(UserInputError, match=match):
        render_chat(with_template(folder, template), MESSAGES, prompt=False, where="x")
    assert time.monotonic() - begin < 15

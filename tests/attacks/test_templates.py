"""Hostile chat templates: they are programs, and run in a sandbox that nothing leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.training.data.parse_line import LineReader
from qalora_compile.untrusted.tokenizer import load_tokenizer
from tests.attacks.support import SECRET, attack, refused
from tests.fuzz.seeds import write_tokenizer

ROW = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]}


def render(folder: Path) -> Callable[[], Any]:
    """Read a chat of a data file with the folder's tokenizer."""

    def run() -> Any:
        reader = LineReader(tokenizer=load_tokenizer(folder), max_length=64)
        return len(reader.read(ROW, "train.jsonl:1").example.tokens)

    return run


def with_template(folder: Path, template: str) -> Path:
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


TEMPLATES = {
    "CVE-2024-34359: classes of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "CVE-2026-5760: globals of a function": (
        "{{ cycler.__init__.__globals__.os.system('touch canary-ran') }}"
    ),
    "CVE-2026-5760: globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "CVE-2024-56326: format kept in a filter": (
        "{{ ['{0.__class__.__mro__}'] | map('format', m) | list }}"
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}"
    ),
    "CVE-2025-27516: format by the filter attr": (
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}"
    ),
    "CVE-2024-56201: another template by name": "{% include 'secret.txt' %}",
    "another template by path": "{% extends '../secret.txt' %}",
    "an import": "{% import 'os' as os %}{{ os.system('true') }}",
    "messages changed in place": "{{ messages.append(messages) }}",
    "an error of its own": "{{ raise_exception('no') }}",
    "a division by zero": "{{ 1 / 0 }}",
    "an unknown name": "{{ unknown.attribute.of.nothing }}",
    "no template": "{% for %}",
    "a recursion without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a range of 10**9": "{% for i in range(1000000000) %}{% endfor %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_gets_nowhere(kind: str, folder: Path) -> None:
    """Templates of tokenizers and of GGUF files have run code in servers that trusted them."""
    outcome = refused(render(with_template(folder, TEMPLATES[kind])), folder)
    assert SECRET not in outcome.error
    assert not list(folder.parent.rglob("canary-ran"))


def test_a_valid_template_renders(folder: Path) -> None:
    write_tokenizer(folder)
    assert attack(render(folder), folder).value == 4

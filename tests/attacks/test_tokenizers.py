"""Hostile tokenizers: code, other files, text that parsers fail on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.capture.load_source import load_source
from qalora_compile.untrusted.tokenizer import load_tokenizer
from tests.attacks.support import SECRET, attack, refused
from tests.fuzz.seeds import FORMATS

READERS: dict[str, Callable[[Path], Any]] = {
    "alone": lambda folder: load_tokenizer(folder)("red is").input_ids,
    "of a model": lambda folder: load_source(str(folder)).tokenizer("red is").input_ids,
}
every_reader = pytest.mark.parametrize("reader", READERS)
CONFIG, FILE = "tokenizer_config.json", "tokenizer.json"


@pytest.fixture
def tokenizer(folder: Path) -> Path:
    FORMATS["HF tokenizer"].build(folder)
    (folder / "canary.py").write_text("import os\nos.system('touch canary-ran')\nclass T: pass\n")
    return folder


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CODE: dict[str, dict[str, Any]] = {
    "CVE-2026-22807: auto_map": {"auto_map": {"AutoTokenizer": ["canary.T", "canary.T"]}},
    "CVE-2026-7669: auto_map of a class that transformers does not have": {
        "auto_map": {"AutoTokenizer": ["canary.T", None]},
        "tokenizer_class": "CanaryTokenizer",
    },
    "CVE-2026-5241: trust_remote_code": {
        "trust_remote_code": True,
        "auto_map": {"AutoTokenizer": ["canary.T", None]},
    },
    "a class that is a module": {"tokenizer_class": "os"},
    "a class of another repository": {"tokenizer_class": "someone/canary"},
}


@every_reader
@pytest.mark.parametrize("kind", CODE)
def test_a_tokenizer_runs_no_code_and_asks_nothing(
    kind: str, reader: str, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code beside a tokenizer was run, or the user was asked whether to run it."""
    change(tokenizer, CONFIG, **CODE[kind])
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    attack(lambda: READERS[reader](tokenizer), tokenizer)
    assert not list(tokenizer.parent.rglob("canary-ran"))


BROKEN: dict[str, tuple[str, bytes]] = {
    "nested 100,000 deep": (FILE, b'{"a":' + b"[" * 100_000),
    "an integer of 5,000 digits": (CONFIG, b'{"model_max_length": ' + b"9" * 5000 + b"}"),
    "a list in place of an object": (FILE, b"[1]"),
    "a number in place of an object": (CONFIG, b"0"),
    "no UTF-8": (CONFIG, b'{"a": "\xff"}'),
    "cut short": (FILE, b'{"version": "1.0", "added_tokens": ['),
    "a model that is none": (FILE, b'{"version": "1.0", "model": {"type": "Canary"}}'),
    "a regular expression that is none": (
        FILE,
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Isolated",
                    "invert": False,
                },
                "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
            }
        ).encode(),
    ),
    "an id of 2**40": (
        FILE,
        b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":1099511627776}}}',
    ),
    "a template that is no UTF-8": ("chat_template.jinja", b"\xff\xfe"),
}


@every_reader
@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_libraries_fail_on_are_refused(kind: str, reader: str, tokenizer: Path) -> None:
    """The libraries raise errors of many kinds, some in Rust."""
    file, content = BROKEN[kind]
    (tokenizer / file).write_bytes(content)
    refused(lambda: READERS[reader](tokenizer), tokenizer)


@every_reader
@pytest.mark.parametrize("file", [FILE, CONFIG, "chat_template.jinja"])
def test_a_file_that_is_a_link_out_of_the_folder(file: str, reader: str, tokenizer: Path) -> None:
    """A link to a file elsewhere is read as if it were the tokenizer's, and shown in messages."""
    (tokenizer / file).unlink()
    (tokenizer / file).symlink_to("../secret.txt")
    outcome = refused(lambda: READERS[reader](tokenizer), tokenizer, "link")
    assert SECRET not in outcome.error


@every_reader
def test_a_valid_tokenizer_is_read(reader: str, tokenizer: Path) -> None:
    assert attack(lambda: READERS[reader](tokenizer), tokenizer).value == [2, 8]

"""Digests of tokenizers, which bind a certificate to the texts that a model reads and writes.

A proof is about token ids. The same text gives the same ids only with the same tokenizer and chat
template, so the digests of both models' tokenizers are a part of a certificate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from qalora_compile.sealed import digest_of_file
from qalora_compile.untrusted import read_object
from qalora_compile.untrusted.artifacts import PROGRAM_FILE, tokenizer_files

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_FOLDER = "tokenizer"
"""Where a program folder has its tokenizer; an edge folder has it next to the other files."""
_TEMPLATE, _CLASS = "chat_template", "tokenizer_class"
_ALIKE = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Two names of one class, which `export` exchanges for older clients."""


def tokenizer_digests(path: Path) -> dict[str, str]:
    """SHA-256 of what each file of a tokenizer says, by name; empty if there is no tokenizer.

    `export` copies the chat template into `tokenizer_config.json` too. It counts once, as
    `chat_template.jinja`, and `tokenizer_config.json` without it.

    Args:
        path: A program folder or an edge folder. A file has no tokenizer.

    Raises:
        UserInputError: a file is beyond the limits of `untrusted`.
    """
    if not path.is_dir():
        return {}
    folder = path / _FOLDER if (path / PROGRAM_FILE).is_file() else path
    found = {file.name: digest_of_file(file) for file in tokenizer_files(folder)}
    if CONFIG_FILE not in found:
        return found
    settings = read_object(folder / CONFIG_FILE)
    settings[_CLASS] = _ALIKE.get(str(settings.get(_CLASS)), settings.get(_CLASS))
    template = settings.get(_TEMPLATE)
    if isinstance(template, str):
        copied = TEMPLATE_FILE in found and template == _text(folder / TEMPLATE_FILE)
        if copied or TEMPLATE_FILE not in found:
            del settings[_TEMPLATE]
        found.setdefault(TEMPLATE_FILE, _digest(template))
    found[CONFIG_FILE] = _digest(json.dumps(settings, sort_keys=True))
    return found


def changed_files(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the files in which two tokenizers differ, or that only one of them has."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _text(file: Path) -> str | None:
    """The text that `export` copies from a file; None if there is none."""
    try:
        return file.read_text("utf-8") if file.is_file() else None
    except UnicodeDecodeError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

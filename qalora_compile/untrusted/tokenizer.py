"""Tokenizers and chat templates of unknown origin: loaded without code, rendered within limits.

A tokenizer's folder may name its own classes (`auto_map`), which are never imported. A chat
template is a program that transformers runs in Jinja's immutable sandbox. The sandbox limits
everything but time and memory, so both are watched here.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted import check_folder, quoted, read_object

_SIGNS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_JSON_FILES = (*_SIGNS[:2], "special_tokens_map.json", "added_tokens.json")
RENDER_SECONDS = 10.0
RENDER_BYTES = 1 << 30
"""The limit by which a template may increase the memory of the process."""
_POLL_SECONDS = 0.02
_GROWING = re.compile(r"\*\*|\d{7}")
"""Powers and numbers of seven digits, with which a single step may exhaust memory."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _SIGNS)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None if there is none. Code in the folder is never run.

    Raises:
        UserInputError: its files are broken or hostile, or it needs code from the folder.
    """
    if not has_tokenizer(folder):
        return None
    transformers = require("transformers", extra="hf", purpose="load a tokenizer")
    check_folder(folder)
    for name in _JSON_FILES:
        if (folder / name).is_file():
            read_object(folder / name)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise many types
        raise UserInputError(
            f"cannot load the tokenizer: {type(error).__name__}: {quoted(str(error), 200)}",
            where=str(folder),
            hint="its files may be damaged, or it may need its own code, which is never run",
        ) from error


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    prompt: bool,
    where: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Render messages with a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a `chat_template`.
        messages: Messages with `role` and `content`, or tool calls.
        prompt: Whether to add the beginning of an answer.
        where: The place of the messages, for errors.
        tools: Descriptions of the functions that may be called, as JSON schemas.

    Raises:
        UserInputError: the template does not take the messages, or needs more than 10 seconds or
            1 GiB.
    """
    _check_template(getattr(tokenizer, "chat_template", None), where)
    found: dict[str, Any] = {}
    more = {"tools": list(tools)} if tools else {}

    def render() -> None:
        try:
            found["text"] = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **more
            )
        except BaseException as error:
            found["error"] = error

    problem = _run_watched(render)
    if problem is None and isinstance(found.get("text"), str):
        return str(found["text"])
    error = found.get("error")
    if isinstance(error, KeyboardInterrupt):
        raise error
    reason = problem or quoted(str(error), 200)
    raise UserInputError(
        f"the chat template does not take the messages: {reason}", where=where
    ) from error


def _check_template(template: Any, where: str) -> None:
    """Refuse templates in which a single step, which cannot be stopped, may exhaust memory."""
    texts = template.values() if isinstance(template, Mapping) else (template,)
    for text in texts:
        found = _GROWING.search(text) if isinstance(text, str) and "*" in text else None
        if found is not None and _multiplies(text):
            raise UserInputError(
                f"the chat template computes with {found.group()!r}, which no chat template needs",
                where=where,
                hint="use the template of a model that you trust",
            )


def _multiplies(template: str) -> bool:
    """Whether a template multiplies by, or raises to the power of, large numbers."""
    jinja2 = require("jinja2", extra="hf", purpose="check a chat template")
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateError:
        return False  # rendering will report what is wrong
    large = 10**6
    return any(
        isinstance(node, jinja2.nodes.Pow)
        or any(
            isinstance(number.value, int) and number.value > large
            for number in node.find_all(jinja2.nodes.Const)
        )
        for node in tree.find_all((jinja2.nodes.Mul, jinja2.nodes.Pow))
    )


def _run_watched(work: Any) -> str | None:
    """Run `work` in a thread; stop it at the limits and return the reason, or None."""
    thread = threading.Thread(target=work, daemon=True)
    begin, before = time.monotonic(), _resident_bytes()
    thread.start()
    problem = None
    wait = 0.0005
    while thread.is_alive():
        thread.join(wait)
        wait = min(2 * wait, _POLL_SECONDS)
        if problem is None:
            problem = _excess(time.monotonic() - begin, _resident_bytes() - before)
            if problem is None:
                continue
        number = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(TimeoutError))
        if time.monotonic() - begin > 2 * RENDER_SECONDS:
            break  # it is in one long step; the thread ends with the process
    return problem


def _excess(seconds: float, size: int) -> str | None:
    if seconds > RENDER_SECONDS:
        return f"it runs for more than {RENDER_SECONDS:.0f} s"
    return f"it takes more than {RENDER_BYTES >> 20} MiB" if size > RENDER_BYTES else None


def _resident_bytes() -> int:
    """Memory of this process; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0

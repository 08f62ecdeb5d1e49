"""Reading what others wrote: JSON within limits, and files that stay inside their folder.

Model folders, adapters and exported files come from strangers. Every reader of this package opens
them through this module: a folder is checked with `check_folder` before anything in it is read, a
file that another file names is found with `member`, and JSON is read with `read_json`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from qalora_compile.errors import UserInputError

MAX_JSON_BYTES = 1 << 28
"""A JSON file of a model is a few megabytes; 256 MiB are a program of many thousand layers."""
MAX_JSON_DEPTH = 200
_MAX_DIGITS = 100
"""`model_max_length` of many tokenizers is 10³⁰; Python itself stops at 4,300 digits."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HUB_BLOBS, _HUB_SNAPSHOTS = "blobs", "snapshots"


def read_json(path: Path, *, finite: bool = False) -> Any:
    """Read a JSON file that anybody may have written.

    Raises:
        UserInputError: the file is missing, no regular file or over 256 MiB; it is not valid JSON,
            names a key twice in one object, is nested more than 200 deep, or holds an integer of
            more than 100 digits or half of a surrogate pair.
    """
    return parse_json(read_bytes(path, limit=MAX_JSON_BYTES), path, finite=finite)


def read_object(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """Read a JSON file whose outermost value is an object; see `read_json`."""
    value = read_json(path, finite=finite)
    if not isinstance(value, dict):
        raise UserInputError(f"{path.name} holds no JSON object", where=str(path))
    return value


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        UserInputError: the file is missing, is a pipe, device or folder, or is larger.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise UserInputError(
            f"{path.name} has {size} bytes, more than the {limit} that such a file may have",
            where=str(path),
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserInputError(
            f"cannot read {path.name}: {error.strerror}", where=str(path)
        ) from None


def parse_json(data: bytes | str, path: Path, *, what: str = "", finite: bool = False) -> Any:
    """Parse JSON; the limits are those of `read_json`.

    Args:
        data: The text, or its UTF-8 bytes.
        path: The file that it stands in, for messages.
        what: What the text is, where it is not the whole file.
        finite: Refuse NaN, infinities and numbers beyond float64, which Python reads and JSON
            does not have.

    Raises:
        UserInputError: see `read_json`.
    """
    name = what or path.name
    numbers: dict[str, Any] = {}
    if finite:
        numbers = {"parse_constant": _finite, "parse_float": _finite}
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer, **numbers)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserInputError(
            f"{name} holds half of a surrogate pair, which is no text", where=str(path)
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{name} is not valid JSON: {error}", where=str(path)) from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: readers disagree on which of two equal keys counts."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses into it."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return
    depth = 0
    for found in _BRACKETS.finditer(text):
        mark = found.group()
        if mark in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
        elif mark in "]}":
            depth -= 1


def check_regular(path: Path) -> None:
    """Refuse what is missing or is no regular file: reading a pipe or a device may never end.

    Raises:
        UserInputError: see above.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserInputError(f"the file {path.name} is missing", where=str(path)) from None
    except (OSError, ValueError) as error:
        raise UserInputError(f"cannot read {path.name!r}: {error}", where=str(path)) from None
    if not stat.S_ISREG(mode):
        raise UserInputError(f"{path.name} is no regular file", where=str(path))


def member(folder: Path, name: object) -> Path:
    """The file of `folder` that another file in it names.

    Raises:
        UserInputError: the name is no text, is absolute, leaves the folder by `..` or by a link,
            or the file is missing or no regular file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserInputError(f"{name!r} is no name of a file", where=str(folder))
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        posix.is_absolute()
        or windows.drive
        or windows.root
        or ".." in {*posix.parts, *windows.parts}
    ):
        raise UserInputError(
            f"the file name {name!r} leads out of the folder",
            where=str(folder),
            hint="a folder may refer to its own files alone: get it from a source that you trust",
        )
    path = folder / name
    check_regular(path)
    check_link(path, folder)
    return path


def check_folder(folder: Path) -> None:
    """Refuse a folder in which a link leads out of it, or that holds pipes, sockets or devices.

    Hidden files and folders are not looked at: no reader opens them. The snapshots of the Hugging
    Face hub's cache, whose files are links to the `blobs` of the same model, are taken.

    Raises:
        UserInputError: see above; the entry is named.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            if not name.startswith("."):
                check_link(Path(root, name), folder)


def check_link(path: Path, folder: Path) -> None:
    """Refuse `path`, an entry of `folder`, if it leads out of the folder or is no file or folder.

    Raises:
        UserInputError: it is a symbolic link to something outside, one name of a file that has
            another name outside (a hard link), or a pipe, socket or device.
    """
    try:
        resolved, info = path.resolve(), path.stat()
    except (OSError, RuntimeError):
        raise UserInputError(f"{path.name} is a link to nothing", where=str(path)) from None
    home = folder.resolve()
    if not resolved.is_relative_to(home) and not _is_hub_blob(resolved, folder):
        raise UserInputError(
            f"{path.name} is a link that leads out of the folder",
            where=str(path),
            hint="copy the file into the folder if you trust what the link points to",
        )
    if stat.S_ISDIR(info.st_mode):
        return
    if not stat.S_ISREG(info.st_mode):
        raise UserInputError(f"{path.name} is no regular file", where=str(path))
    if info.st_nlink > 1 and resolved.is_relative_to(home):
        _check_hard_link(path, info, home)


def _check_hard_link(path: Path, info: os.stat_result, home: Path) -> None:
    key = (info.st_dev, info.st_ino)
    inside = 0
    for root, _, files in os.walk(home):
        for name in files:
            other = os.lstat(os.path.join(root, name))
            inside += (other.st_dev, other.st_ino) == key
    if inside < info.st_nlink:
        raise UserInputError(
            f"{path.name} is a hard link to a file that has another name outside the folder",
            where=str(path),
            hint="copy the folder (cp -r) if you trust it",
        )


def _is_hub_blob(resolved: Path, folder: Path) -> bool:
    """Whether a link of a hub snapshot leads to the blobs beside the model's snapshots."""
    absolute = Path(os.path.abspath(folder))
    for parent in (absolute, *absolute.parents):
        if parent.parent.name == _HUB_SNAPSHOTS:
            return resolved.parent == parent.parent.parent.resolve() / _HUB_BLOBS
    return False


def check_fields(kind: Any, row: object, what: str) -> dict[str, Any]:
    """Compare a JSON object with the fields of a dataclass: its names, and their types.

    Args:
        kind: The dataclass, of texts, numbers, booleans, None, unions or tuples of them.
        row: The object; lists stand for tuples.
        what: What it describes, for messages.

    Returns:
        The fields as arguments of the dataclass, lists as tuples.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if not isinstance(row, dict) or required - row.keys() or row.keys() - hints.keys():
        raise ValueError(f"{what} has other fields than {', '.join(sorted(hints))}")
    for name, value in row.items():
        if not _is_of(hints[name], value):
            raise ValueError(f"{name} of {what} is {quoted(value)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}


def _is_of(hint: Any, value: object) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(each, value) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_of(get_args(hint)[0], v) for v in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def quoted(value: object, limit: int = 80) -> str:
    """What a file says, for a message or a generated text: one line of printable characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"

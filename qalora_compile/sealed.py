"""Records that detect damage: JSON with a SHA-256 of itself and of the files that it describes.

A flipped bit in a weight, a truncated copy or a file from another run changes results without an
error. So the records of this package hold digests, which are compared when a folder is read. They
detect damage, not tampering: whoever changes a folder on purpose can write new digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.files import write_json
from qalora_compile.untrusted import read_object

SEAL = "sha256"
"""The key for a record's own digest."""
_HINT = "get the folder again, or read it as it is with --no-verify (sealed.unchecked())"

_checking: ContextVar[bool] = ContextVar("qalora_checking", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """Do not compare digests in the block; `--no-verify` on the command line."""
    token = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(token)


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically, with the digest of its contents under `sha256`."""
    write_json(path, {**value, SEAL: _digest(value)})


def read_sealed(path: Path, *, since: int = 1) -> dict[str, Any]:
    """Read a record and compare its digest; returns the record without the digest.

    Args:
        path: The file.
        since: The first `version` of the record with a digest; older ones need none.

    Raises:
        UserInputError: the file is missing, is not a JSON object, or was changed after writing.
    """
    value = read_object(path)
    found, version = value.pop(SEAL, None), value.get("version")
    older = found is None and isinstance(version, int) and version < since
    if older or not _checking.get():
        return value
    if found != _digest(value):
        raise UserInputError(
            f"{path.name} was changed after it was written: its SHA-256 differs",
            where=str(path),
            hint=_HINT,
        )
    return value


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """SHA-256 of files in a folder, by name, in the form that `check_files` takes."""
    return {name: [digest_of_file(folder / name)] for name in sorted(names)}


def check_files(folder: Path, digests: object) -> None:
    """Compare files with the digests that a record holds for them.

    Args:
        folder: Where the files are.
        digests: Name → allowed digests: one, or two while the file is being replaced.

    Raises:
        UserInputError: a file is missing or has another digest, or the digests are malformed.
    """
    if not isinstance(digests, Mapping):
        raise UserInputError("the record holds no digests of its files", where=str(folder))
    if not _checking.get():
        return
    for name, admitted in digests.items():
        path = folder / str(name)
        if not path.is_file():
            raise UserInputError(f"the file {name} is missing", where=str(folder), hint=_HINT)
        if not isinstance(admitted, list) or digest_of_file(path) not in admitted:
            raise UserInputError(
                f"{name} was changed after it was written: its SHA-256 differs",
                where=str(path),
                hint=_HINT,
            )


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

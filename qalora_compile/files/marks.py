"""Marks in files and folders that this package wrote, which it may therefore replace."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from qalora_compile.errors import QaloraError
from qalora_compile.untrusted import read_json
from qalora_compile.untrusted.pt2_file import METADATA_FILE

_RECORDS = {
    "run.json": "qalora-run",
    "qalora.json": "qalora-edge",
    "export.json": "qalora-export",
    "state.json": "qalora-checkpoint",
    "reproduction.json": "qalora-reproduction",
    "program.json": "qalora-program",
    "patch.json": "qalora-patch",
}
"""File in a folder → the `format` that it names; those that are quick to read come first."""
_PEFT_FILE, _PEFT_MARK = "adapter_config.json", "qalora_pooling"
"""PEFT's own file, and the entry that only this package puts into it."""
_CERTIFICATE = "qalora-certificate"

GENERATOR = '<meta name="generator" content="qalora-compile">'
"""The mark in the head of every page."""
GGUF_KEY = "qalora.made_by"
"""The mark in the metadata of every GGUF file."""
PRODUCER = "qalora-compile"
"""The mark of every ONNX model, and the name of every OpenVINO model."""

PACKAGE_SUFFIX, PACKAGE_MANIFEST = ".mlpackage", "Manifest.json"
"""Of a Core ML package, whose manifest describes its parts as written by `PRODUCER`."""

_HEAD_BYTES, _ZIP = 1 << 16, b"PK\x03\x04"
_ORT_FORMAT = b"ORTM"
"""Bytes 4 to 8 of a model in ONNX Runtime's own format, whose producer is named at its end."""
_OPENVINO_HEAD = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<net name=\"" + PRODUCER.encode() + rb"\"")
_ONNX_HEAD = re.compile(rb"\x08[\x00-\x7f]\x12" + bytes([len(PRODUCER)]) + PRODUCER.encode())
"""`ir_version` and `producer_name`, as protobuf encodes them at the beginning of the file."""


def is_own_folder(folder: Path) -> bool:
    """Whether this package wrote a folder, according to a file in it; an empty folder counts."""
    if any(_is_of(folder / name, kind) for name, kind in _RECORDS.items()):
        return True
    if folder.suffix == PACKAGE_SUFFIX and _is_own_manifest(folder / PACKAGE_MANIFEST):
        return True
    settings = _read(folder / _PEFT_FILE)
    is_ours = isinstance(settings, dict) and _PEFT_MARK in settings
    return is_ours or not any(folder.iterdir())


def _is_own_manifest(path: Path) -> bool:
    """Whether the manifest of a Core ML package describes a part as written by this package."""
    manifest = _read(path)
    entries = manifest.get("itemInfoEntries") if isinstance(manifest, dict) else None
    parts = entries.values() if isinstance(entries, dict) else ()
    return any(PRODUCER in str(part.get("description")) for part in parts if isinstance(part, dict))


def is_own_file(path: Path) -> bool:
    """Whether this package wrote a file; an empty file counts.

    Known are ONNX models (also in ONNX Runtime's own format), OpenVINO and `.pt2` models, GGUF
    files, pages and certificates.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_ZIP):
        return _is_own_archive(path)
    if head.startswith(b"GGUF"):
        return GGUF_KEY.encode() in head
    if head[4:8] == _ORT_FORMAT:
        return PRODUCER.encode() in _tail(path)
    if any(form.match(head) for form in (_ONNX_HEAD, _OPENVINO_HEAD)):
        return True
    if GENERATOR.encode() in head or not head:
        return True
    return head[:1] == b"{" and _is_of(path, _CERTIFICATE)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _HEAD_BYTES))
        return file.read()


def _is_own_archive(path: Path) -> bool:
    """Whether a `.pt2` archive holds our metadata; a compiled one is ours if its model is."""
    try:
        with zipfile.ZipFile(path) as archive:
            own = any(name.endswith(f"/extra/{METADATA_FILE}") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False
    model = path.with_name(path.name.replace("_aot.", "."))
    return own or (model != path and model.is_file() and is_own_file(model))


def _is_of(path: Path, kind: str) -> bool:
    value = _read(path)
    return isinstance(value, dict) and value.get("format") == kind


def _read(path: Path) -> object:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except QaloraError:
        return None

"""Hostile GGUF files: counts, lengths, types, alignment, names twice, and what metadata claim."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qalora_compile.capture.checkpoints.gguf import read_gguf_codes
from qalora_compile.capture.describe_model import describe
from qalora_compile.capture.load_source import load_source
from qalora_compile.exporters.checkpoints.gguf.metadata import write_metadata_file
from tests.attacks.support import SECRET, attack, cli, given, refused, refused_by_all
from tests.capture.checkpoints.gguf_files import finish, write_llama

READERS: dict[str, Callable[[Path], Any]] = {
    "model": lambda path: load_source(str(path)).kind,
    "codes": lambda path: len(read_gguf_codes(path)[0]),
    "metadata": lambda path: write_metadata_file(path, path.with_name("metadata.gguf")),
    "describe": lambda path: sorted(describe(path).shapes)[:3],
}
U32, STRING, ARRAY, U64 = 4, 8, 9, 10


def text(value: bytes | str, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, axes: int = -1
) -> bytes:
    count = len(shape) if axes < 0 else axes
    head = text(name) + struct.pack("<I", count) + b"".join(struct.pack("<Q", n) for n in shape)
    return head + struct.pack("<IQ", kind, offset)


def built(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    payload: int = 256,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    pad: int = 32,
) -> bytes:
    keys = (key("general.architecture", STRING, text("llama")), *keys)
    said = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *said) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % pad) + b"\0" * payload


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0)


ALIGNMENT = "general.alignment"
FILES: dict[str, bytes] = {
    "CVE-2024-23605: a count of keys that overflows": built(counts=(0, 2**63)),
    "CVE-2024-23605: a count of keys beyond the file": built(counts=(0, 10_000)),
    "CVE-2024-21836: a count of tensors that overflows": built(counts=(2**61, 1)),
    "CVE-2024-21836: a count of tensors beyond the file": built(counts=(10_000, 1)),
    "CVE-2024-21825: an array whose size overflows": built(
        (key("a", ARRAY, struct.pack("<IQ", U64, 2**61)),)
    ),
    "CVE-2024-21825: an array of texts beyond the file": built(
        (key("a", ARRAY, struct.pack("<IQ", STRING, 2**40)),)
    ),
    "CVE-2024-23496: a text whose length overflows": built(
        (key("a", STRING, text("x", 2**64 - 1)),)
    ),
    "CVE-2024-23496: a key whose length overflows": built((text("a", 2**64 - 1),), counts=(0, 2)),
    "CVE-2024-21802: more axes than a tensor may have": built(
        tensors=(tensor(shape=(1,) * 5, axes=5),)
    ),
    "CVE-2024-21802: axes beyond the file": built(tensors=(tensor(shape=(), axes=2**32 - 1),)),
    "CVE-2024-21802: an unknown type of tensor": built(tensors=(tensor(kind=4),)),
    "llama.cpp 19856: a type below zero": built(tensors=(tensor(kind=2**32 - 1),)),
    "CVE-2025-53630: sizes of tensors whose sum overflows": built(
        tensors=(tensor("a", (2**61,)), tensor("b", (2**61,), offset=2**63))
    ),
    "CVE-2026-27940: a product of axes that overflows": built(
        tensors=(tensor(shape=(2**32, 2**32)),)
    ),
    "CVE-2026-27940: an offset that overflows": built(tensors=(tensor(offset=2**64 - 32),)),
    "CVE-2026-7482: a tensor larger than its bytes": built(tensors=(tensor(shape=(64, 64)),)),
    "CVE-2026-7482: an offset behind the end": built(tensors=(tensor(offset=4096),)),
    "llama.cpp 19856: an alignment of 0": built((key(ALIGNMENT, U32, struct.pack("<I", 0)),)),
    "llama.cpp 19856: an alignment of 3": built((key(ALIGNMENT, U32, struct.pack("<I", 3)),)),
    "an alignment of 2**31": built((key(ALIGNMENT, U32, struct.pack("<I", 2**31)),)),
    "an alignment that is a text": built((key(ALIGNMENT, STRING, text("32")),)),
    "llama.cpp 19856: a key twice": built(
        tuple(key("a", U32, struct.pack("<I", n)) for n in range(2))
    ),
    "a tensor twice": built(tensors=(tensor(), tensor(offset=128))),
    "tensors that overlap": built(tensors=(tensor("a"), tensor("b", offset=32))),
    "an offset that is not aligned": built(tensors=(tensor(offset=8),)),
    "GGUF-PY-F001: arrays nested 10,000 deep": built((key("a", ARRAY, nested(10_000)),)),
    "an array of an unknown type": built((key("a", ARRAY, struct.pack("<IQ", 77, 1)),)),
    "arrays of more entries than any vocabulary": built(
        (key("a", ARRAY, struct.pack("<IQ", 0, 2**22) + b"\0" * 2**22),)
    ),
    "a boolean of 7": built((key("a", 7, b"\7"),)),
    "a name that is no UTF-8": built((key(b"\xff\xfe", U32, struct.pack("<I", 0)),)),
    "a name with terminal escapes": built((key("\x1b[31m", U32, struct.pack("<I", 0)),)),
    "an axis of 0": built(tensors=(tensor(shape=(0,)),)),
    "a row that is no whole blocks": built(tensors=(tensor(shape=(33, 32), kind=2),)),
    "a version of the other byte order": built(version=3 << 24),
    "no more than a magic": b"GGUF",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_structure_that_lies_is_refused(kind: str, folder: Path) -> None:
    """Each is a count, a size, a type or a name that parsers of GGUF in C or Python trusted."""
    path = folder / "model.gguf"
    path.write_bytes(FILES[kind])
    refused_by_all(given(READERS, path), folder)


def llama(folder: Path, **metadata: int) -> Path:
    """A valid file, some of whose numbers say something else."""
    path = write_llama(folder / "model.gguf", "F32")
    data = bytearray(path.read_bytes())
    for name, value in metadata.items():
        at = data.index(f"llama.{name}".encode()) + len(f"llama.{name}") + 4
        struct.pack_into("<I", data, at, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("reader", ["model", "describe"])
@pytest.mark.parametrize(
    "metadata",
    [
        {"block_count": 10000000},
        {"embedding_length": 2**31},
        {"feed_forward_length": 2**31},
        {"vocab_size": 2**31},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_metadata_do_not_decide_how_much_is_built(
    metadata: dict[str, int], reader: str, folder: Path
) -> None:
    """Ten million layers, or a width of 2³¹, over the tensors of two small layers."""
    path = llama(folder, **metadata)
    refused(lambda: READERS[reader](path), folder, "by the tensors of the checkpoint")


def test_a_valid_file_is_read(folder: Path) -> None:
    path = llama(folder)
    for reader, wanted in (("model", "gguf"), ("codes", 0)):
        outcome = attack(lambda reader=reader: READERS[reader](path), folder)  # type: ignore[misc]
        assert outcome.value == wanted


def with_template(folder: Path, template: str) -> Path:
    """A file whose tokenizer has this chat template."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(template)
    writer.add_tensor("t", np.zeros(32, np.float32))
    finish(writer)
    return path


def test_cve_2024_34359_a_template_in_metadata_is_only_copied(folder: Path) -> None:
    """llama-cpp-python rendered templates of files without a sandbox; here they are data."""
    path = with_template(folder, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    attack(lambda: READERS["metadata"](path), folder)
    assert SECRET not in str(attack(cli("inspect", path), folder))

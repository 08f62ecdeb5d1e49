"""Hostile safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from qalora_compile.ir.safetensors_io import load_tensors, read_headers
from qalora_compile.verify.proof.graphs.stored_tensor import read_safetensors
from tests.attacks.support import attack, given, refused_by_all

READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: sorted(load_tensors(path)),
    "headers": lambda path: sorted(read_headers(path)),
    "proof": lambda path: sorted(read_safetensors(path)),
}


def row(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def built(header: object, payload: bytes = b"\0" * 32, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


ONE = {"a": row("F32", [8], 0, 32)}
FILES: dict[str, tuple[bytes, str]] = {
    "audit 2023: duplicate keys": (
        built(
            b'{"a":'
            + json.dumps(ONE["a"]).encode()
            + b',"a":'
            + json.dumps(ONE["a"]).encode()
            + b"}"
        ),
        "occurs twice",
    ),
    "audit 2023: tensors overlap": (
        built({"a": row("F32", [8], 0, 32), "b": row("F32", [4], 16, 32)}),
        "overlaps with a",
    ),
    "audit 2023: a hole before the first tensor": (
        built({"a": row("F32", [4], 16, 32)}),
        "leaves bytes unused",
    ),
    "audit 2023: bytes behind the last tensor (a polyglot)": (
        built(ONE, b"\0" * 32 + b"PK\x05\x06" + b"\0" * 18),
        "belong to no tensor",
    ),
    "a header of 2**64 - 1 bytes": (built(ONE, length=2**64 - 1), "cut short"),
    "a header of 2**63 bytes": (built(ONE, length=2**63), "cut short"),
    "a header over the limit": (built(b"{" + b" " * (1 << 25) + b"}"), "over"),
    "an offset behind the end": (built({"a": row("F32", [8], 0, 2**62)}), "has bytes"),
    "negative offsets": (built({"a": row("F32", [8], -32, 0)}), "data_offsets"),
    "an end before the begin": (built({"a": row("F32", [8], 32, 0)}), "has bytes"),
    "a product of axes that overflows 64 bits": (
        built({"a": row("F32", [2**32, 2**32, 2], 0, 32)}),
        "has bytes",
    ),
    "axes of zero and of 2**62": (built({"a": row("F32", [2**62, 0], 0, 0)}), "belong to no"),
    "an axis of floating point": (built({"a": row("F32", [8.0], 0, 32)}), "the shape of a"),
    "a shape that is a text": (built({"a": {**ONE["a"], "shape": "8"}}), "the shape of a"),
    "a header nested 100,000 deep": (built(b'{"a":' + b"[" * 100_000), "nested more than"),
    "an integer of 5,000 digits": (
        built(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,32]}}'),
        "digits",
    ),
    "a name that is half of a character": (
        built(b'{"\\ud800":' + json.dumps(ONE["a"]).encode() + b"}"),
        "surrogate",
    ),
    "a name with terminal escapes": (built({"\x1b[31m": ONE["a"]}), "not a tensor name"),
    "a header that is a list": (built([1]), "not a JSON object"),
    "no header": (b"\x08\0\0", "cut short"),
    "metadata that is a number": (built({**ONE, "__metadata__": {"a": 1}}), "__metadata__"),
    "an unknown type": (built({"a": row("F128", [2], 0, 32)}), "F128"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_header_that_contradicts_itself_is_refused(kind: str, tmp_path: Path) -> None:
    """Kinds from the audit of safetensors by Trail of Bits (2023), and lies about sizes."""
    content, words = FILES[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused_by_all(given(READERS, path), tmp_path, words)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_types_that_need_scales_are_refused_by_name(dtype: str, tmp_path: Path) -> None:
    """A small float is no number without its scale."""
    path = tmp_path / "model.safetensors"
    bits = 4 if dtype == "F4" else 8
    path.write_bytes(built({"a": row(dtype, [32 * 8 // bits], 0, 32)}))
    refused_by_all(given(READERS, path), tmp_path, dtype)


def test_a_valid_file_is_read_by_all(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": torch.ones(2, 3), "b": torch.tensor(True)}))
    for reader in READERS.values():
        outcome = attack(lambda reader=reader: reader(path), tmp_path)  # type: ignore[misc]
        assert outcome.value == ["a", "b"]


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """Reading a pipe never ends."""
    import os

    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    refused_by_all(given(READERS, path), tmp_path, "not a regular file")

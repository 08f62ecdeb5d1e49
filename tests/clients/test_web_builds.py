"""What the builds of onnxruntime-web are made of: the preset web was measured with these."""

from __future__ import annotations

import re

import pytest

from tests.clients.conftest import WEB

DIST = WEB / "node_modules" / "onnxruntime-web" / "dist"
RELAXED = re.compile(rb"\xfd[\x80-\x93]\x02")
"""The 20 instructions of relaxed SIMD, 0x100 to 0x113 after the prefix."""
ARITHMETIC = re.compile(rb"\xfd[\xe4-\xe7]\x01")
"""Sum, difference, product and quotient of four floats."""
_CODE = 10


def code_of(module: bytes) -> bytes:
    """The code section of a WebAssembly module."""
    place = len(b"\0asm") + 4
    while place < len(module):
        section = module[place]
        size, place = number(module, place + 1)
        if section == _CODE:
            return module[place : place + size]
        place += size
    raise AssertionError("the module has no code")


def number(module: bytes, place: int) -> tuple[int, int]:
    """An integer in LEB128, and where it ends."""
    value = shift = 0
    while True:
        byte, place = module[place], place + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place


def test_no_kernel_is_in_relaxed_simd() -> None:
    builds = sorted(DIST.glob("*.wasm"))
    if not builds:
        pytest.skip("onnxruntime-web is not installed: make clients")
    for build in builds:
        code = code_of(build.read_bytes())
        assert len(ARITHMETIC.findall(code)) > 1000, "SIMD is there, and found"
        # The bytes also occur by chance, about once in 20 MB; a kernel would have dozens.
        assert len(RELAXED.findall(code)) < 5, build.name

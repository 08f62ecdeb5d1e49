"""Read protobuf messages as bytes, without copies and without allocations by claimed sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError

MAX_AXES = 16
"""Limit of the integers in one list."""


class MessageReader:
    """Reads the messages of one ONNX file.

    Args:
        path: The file, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def fields(self, data: Any) -> Iterator[tuple[int, Any]]:
        """Number and value of each field: an integer, or the bytes of a longer field."""
        if not isinstance(data, memoryview):
            raise self.broken("a message is a number")
        at, end = 0, len(data)
        while at < end:
            tag, at = self.varint(data, at)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = self.varint(data, at)
                yield number, value
                continue
            if wire == 2:
                length, at = self.varint(data, at)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise self.broken("it is not a protobuf message")
            if number == 0 or length > end - at:
                raise self.broken("it is truncated, or not a protobuf message")
            yield number, data[at : at + length]
            at += length

    def varint(self, data: memoryview, at: int) -> tuple[int, int]:
        """An integer, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                raise self.broken("it is truncated, or not a protobuf message")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
        raise self.broken("it is not a protobuf message")

    def integers(self, value: Any) -> list[int]:
        """A repeated integer: a single one, or several packed ones."""
        if isinstance(value, int):
            return [signed(value)]
        found, at = [], 0
        while at < len(value):
            number, at = self.varint(value, at)
            found.append(signed(number))
            if len(found) > MAX_AXES:
                raise self.broken(f"a tensor has more than {MAX_AXES} axes")
        return found

    def pair(self, data: Any) -> tuple[str, str]:
        """The texts of fields 1 and 2, which are an entry of a map."""
        found = {1: "", 2: ""}
        for number, value in self.fields(data):
            if number in found:
                found[number] = self.text(value)
        return found[1], found[2]

    def text(self, value: Any) -> str:
        """A field as text."""
        if not isinstance(value, memoryview):
            raise self.broken("a text is a number")
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken("a text is not UTF-8") from error

    def broken(self, what: str) -> UserInputError:
        """The error that refuses the file."""
        return UserInputError(
            f"{self.path.name} cannot be read as an ONNX model: {what}",
            where=str(self.path),
            hint="export it again; a truncated file cannot be repaired",
        )


def signed(value: int) -> int:
    """An unsigned 64-bit integer of a message as a signed one."""
    return value - (1 << 64) if value >> 63 else value

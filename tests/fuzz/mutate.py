"""Structure-aware mutations: of JSON, of headers of safetensors and GGUF, of protobuf, of bytes.

Each is drawn by hypothesis, and says whether the file still is a valid one that merely says
something else (`content`): a number, a text or a weight was changed for another of its kind. Of
such a change no reader of a format without checksums can know. Anything else has to be noticed,
or to make no difference.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.json_texts import NUMBERS, TEXTS, changed_json
from tests.fuzz.mutate_onnx import mutate_onnx

Draw = Callable[[Any], Any]


@dataclass(frozen=True)
class Mutation:
    """What was done to an input."""

    kind: str
    file: str
    detail: str
    content: bool


def mutate(draw: Draw, folder: Path, patterns: tuple[str, ...]) -> Mutation:
    """Change one of a folder's files in one place."""
    files = sorted({f for p in patterns for f in folder.glob(p) if f.is_file()})
    path = draw(st.sampled_from(files))
    modes: list[Callable[[Draw, Path], tuple[str, str, bool]]] = [_bytes]
    if path.suffix == ".json":
        modes += [_json] * 5
    elif path.suffix == ".jsonl":
        modes += [_json_lines] * 5
    elif path.suffix == ".safetensors":
        modes += [_safetensors] * 4
    elif path.suffix == ".gguf":
        modes += [_gguf] * 3
    elif path.suffix == ".onnx":
        modes += [mutate_onnx] * 5
    elif path.suffix == ".ort":
        modes += [_words] * 4
    elif path.suffix == ".pt2":
        modes += [_archive] * 5
    kind, detail, content = draw(st.sampled_from(modes))(draw, path)
    return Mutation(kind, str(path.relative_to(folder)), detail[:200], content)


def _bytes(draw: Draw, path: Path) -> tuple[str, str, bool]:
    """Bits and bytes, wherever they stand."""
    data = bytearray(path.read_bytes())
    size = len(data)
    kind = draw(st.sampled_from(("flip", "flip", "flip", "set", "cut", "grow", "empty", "repeat")))
    at = draw(st.integers(0, max(0, size - 1)))
    if kind == "flip" and size:
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "set" and size:
        data[at] = draw(st.sampled_from((0, 0x7F, 0x80, 0xFF)))
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += draw(st.binary(min_size=1, max_size=16))
    elif kind == "empty":
        data.clear()
    elif kind == "repeat":
        data[at:at] = data[at : at + draw(st.integers(1, 64))]
    path.write_bytes(data)
    # text that is still JSON, lines of text, and raw weights are what they were, otherwise filled
    loose = path.suffix in (".jsonl", ".jinja", ".data") or (
        path.suffix == ".json" and kind != "cut"
    )
    return kind, f"at {at} of {size}", kind in ("flip", "set") or loose


def _json(draw: Draw, path: Path) -> tuple[str, str, bool]:
    text, detail, content = changed_json(draw, path.read_text("utf-8"))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return "json", detail, content


def _json_lines(draw: Draw, path: Path) -> tuple[str, str, bool]:
    lines = path.read_text("utf-8").splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at], detail, content = changed_json(draw, lines[at])
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n")
    return "line", f"{at}: {detail}", content


def _safetensors(draw: Draw, path: Path) -> tuple[str, str, bool]:
    """The header, or a bit of a tensor."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw(
        st.sampled_from(("length", "dtype", "shape", "offsets", "json", "rename", "payload"))
    )
    if kind == "length":
        other = draw(st.sampled_from((0, 1, length - 1, length + 1, len(data), 2**32, 2**64 - 1)))
        path.write_bytes(struct.pack("<Q", other) + data[8:])
        return kind, str(other), False
    if kind == "payload" and payload:
        at = draw(st.integers(0, len(payload) - 1))
        changed = bytearray(payload)
        changed[at] ^= 1 << draw(st.integers(0, 7))
        path.write_bytes(data[: 8 + length] + changed)
        return kind, f"bit at {at}", True
    content = False
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    row = header[name]
    if kind == "dtype":
        kinds = (
            "F64",
            "F32",
            "F16",
            "BF16",
            "I64",
            "I32",
            "I8",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F4",
            "x",
            1,
        )
        row["dtype"] = draw(st.sampled_from(kinds))
        content = True  # of as many bits: the same bytes, said to be something else
    elif kind == "shape":
        other = [draw(st.sampled_from(NUMBERS)) for _ in row["shape"]] or [1]
        row["shape"] = draw(
            st.sampled_from((other, row["shape"][::-1], [*row["shape"], 1], "x", None))
        )
        content = True  # as many values in another arrangement
    elif kind == "offsets":
        at = draw(st.integers(0, 1))
        row["data_offsets"][at] = draw(st.sampled_from((*NUMBERS, row["data_offsets"][at] + 4)))
    elif kind == "rename":
        other = draw(st.sampled_from((*TEXTS, *names)))
        header = {other if each == name else each: value for each, value in header.items()}
        content = True
    if kind == "json":
        text, detail, content = changed_json(draw, json.dumps(header))
    else:
        text, detail = json.dumps(header), f"{name}: {header.get(name)}"
    raw = text.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)
    return kind, detail, content


def _words(draw: Draw, path: Path) -> tuple[str, str, bool]:
    """A number of a FlatBuffers message: an offset, a length, or a value."""
    data = bytearray(path.read_bytes())
    width = draw(st.sampled_from((2, 4, 4, 8)))
    at = draw(st.integers(0, len(data) // width - 1)) * width
    old = int.from_bytes(data[at : at + width], "little")
    values = (0, 1, old + 1, old - 1, old + width, old * 2, len(data), 2**31, 2**32 - 1, 2**63)
    new = draw(st.sampled_from(values)) % 2 ** (8 * width)
    data[at : at + width] = new.to_bytes(width, "little")
    path.write_bytes(data)
    return "word", f"{width} bytes at {at}: {old} → {new}", True


def _archive(draw: Draw, path: Path) -> tuple[str, str, bool]:
    """An entry of a zip archive, written again with its checksum: JSON, or a bit of a tensor."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    at = draw(st.sampled_from([n for n, (_, data) in enumerate(entries) if data]))
    info, data = entries[at]
    kind, detail, content = "drop", "", True
    if info.filename.endswith(".json"):
        text, detail, content = changed_json(draw, data.decode())
        entries[at] = info, text.encode("utf-8", "surrogatepass")
        kind = "json"
    elif draw(st.booleans()):
        changed = bytearray(data)
        changed[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        entries[at], kind = (info, bytes(changed)), "payload"
    else:
        del entries[at]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for each, held in entries:
            archive.writestr(each.filename, held)
    return kind, f"{info.filename}: {detail}", content


_WIDTHS = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
"""Bytes of the plain types of GGUF: another of as many bytes says the same bits."""


def _gguf(draw: Draw, path: Path) -> tuple[str, str, bool]:
    """Counts, types, sizes and offsets, by their places in the file."""
    data = bytearray(path.read_bytes())
    places = _gguf_places(bytes(data))
    what, at, form = draw(st.sampled_from(places))
    size = struct.calcsize(form)
    if form == "bytes":
        raise AssertionError(what)
    top = 2 ** (8 * size)
    old = int.from_bytes(data[at : at + size], "little")
    values = (
        0,
        1,
        old + 1,
        old - 1,
        old * 2,
        32,
        33,
        255,
        2**31,
        2**32 - 1,
        2**61,
        2**63,
        2**64 - 1,
    )
    new = draw(st.sampled_from(values)) % top
    data[at : at + size] = new.to_bytes(size, "little")
    path.write_bytes(data)
    same = what == "type of a value" and _WIDTHS.get(old, 0) == _WIDTHS.get(new, 1)
    content = same or what in ("value", "type of a tensor")
    return what, f"{what} at {at}: {old} → {new}", content


def _gguf_places(data: bytes) -> list[tuple[str, int, str]]:
    """Where in a valid file its counts, types and sizes are."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    found = [("version", 4, "<I"), ("tensors", 8, "<Q"), ("keys", 16, "<Q")]
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    at = 24

    def text(what: str) -> None:
        nonlocal at
        found.append((what, at, "<Q"))
        at += 8 + struct.unpack_from("<Q", data, at)[0]

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text("length of a text")
        elif kind == 9:
            found.extend([("type of an array", at, "<I"), ("length of an array", at + 4, "<Q")])
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            for index in range(count):
                if inner == 8 and index > 2:
                    at += 8 + struct.unpack_from("<Q", data, at)[0]
                else:
                    value(inner)
        else:
            found.append(("value", at, {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}[sizes[kind]]))
            at += sizes[kind]

    for _ in range(keys):
        text("length of a key")
        found.append(("type of a value", at, "<I"))
        at += 4
        value(struct.unpack_from("<I", data, at - 4)[0])
    for _ in range(tensors):
        text("length of a name")
        (axes,) = struct.unpack_from("<I", data, at)
        found.append(("axes", at, "<I"))
        found += [("size of an axis", at + 4 + 8 * axis, "<Q") for axis in range(axes)]
        at += 4 + 8 * axes
        found += [("type of a tensor", at, "<I"), ("offset", at + 4, "<Q")]
        at += 12
    return found

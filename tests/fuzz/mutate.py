"""Structure-aware mutations: of JSON, of the headers of safetensors and GGUF, of protobuf, of bytes.

Each is drawn by hypothesis, and says whether the file still is a valid one that merely says
something else (`content`): a number, a text or a weight was changed for another of its kind. Of
such a change no reader of a format without checksums can know. Anything else has to be noticed,
or to make no difference.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[Any], Any]


@dataclass(frozen=True)
class Mutation:
    """What was done to an input."""

    kind: str
    file: str
    detail: str
    content: bool


TEXTS = (
    "", "x", "../../secret", "/etc/hostname", "C:\\x", "\0", "\n[/red]\x1b[2J", "é" * 3, "a" * 5000,
    "__import__('os')", "{{ 1/0 }}", "(a+)+$", "re:(.*.*)*x", "NaN", "-1", "true", "null",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**7, 10**50, 0.5, 1e-9, -0.5, 1e30, 1e308,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, 0, 1, -1, 1.5, "x", "", [], [1], {}, {"a": 1}, [[[]]])
_RAW = {
    "NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "1e999": "1e999",
    "a number of 5000 digits": "9" * 5000, "half a surrogate": '"\\ud800"',
    "nested": "[" * 100_000 + "]" * 100_000, "no value": "", "a control character": '"\x01"',
}  # fmt: skip
"""Texts that are put where a value was."""
_MARK = "@@mark@@"


def mutate(draw: Draw, folder: Path, patterns: tuple[str, ...]) -> Mutation:
    """Change one of a folder's files in one place."""
    files = sorted({f for p in patterns for f in folder.glob(p) if f.is_file()})
    path = draw(st.sampled_from(files))
    ways: list[Callable[[Draw, Path], tuple[str, str, bool]]] = [_bytes]
    if path.suffix == ".json":
        ways += [_json] * 5
    elif path.suffix == ".jsonl":
        ways += [_json_lines] * 5
    elif path.suffix == ".safetensors":
        ways += [_safetensors] * 4
    elif path.suffix == ".gguf":
        ways += [_gguf] * 3
    elif path.suffix == ".onnx":
        ways += [_onnx] * 5
    kind, detail, content = draw(st.sampled_from(ways))(draw, path)
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


def _places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value[:8]))
    found = [way] if way else []
    for key, each in inner:
        found += _places(each, (*way, key))
    return found


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


def changed_json(draw: Draw, text: str) -> tuple[str, str, bool]:
    """A text of JSON with one change."""
    value = json.loads(text)
    places = _places(value)
    kind = draw(st.sampled_from(("other", "same", "same", "delete", "twice", "raw", "root", "add")))
    if not places or kind == "root":
        other = draw(st.sampled_from(OTHERS))
        return json.dumps(other), f"all of it is {other!r}", False
    way = draw(st.sampled_from(places))
    holder = value
    for key in way[:-1]:
        holder = holder[key]
    key, old = way[-1], holder[way[-1]]
    name = ".".join(map(str, way))
    if kind == "delete":
        del holder[key]
        return json.dumps(value), f"{name} deleted", True
    if kind == "add":
        other = draw(st.sampled_from(OTHERS))
        if isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS)) or "new"] = other
        else:
            holder.insert(key, other)
        return json.dumps(value), f"{other!r} added beside {name}", True
    if kind == "twice":
        holder[key] = _MARK
        pair = f"{json.dumps(str(key))}: {json.dumps(old)}"
        if not isinstance(holder, dict):
            holder[key] = old
            holder.insert(key, old)
            return json.dumps(value), f"{name} twice", True
        marked = json.dumps(value).replace(
            f'{json.dumps(str(key))}: "{_MARK}"', f"{json.dumps(str(key))}: 1, {pair}", 1
        )
        return marked, f"the key {name} twice", False
    if kind == "raw":
        what = draw(st.sampled_from(sorted(_RAW)))
        holder[key] = _MARK
        return json.dumps(value).replace(f'"{_MARK}"', _RAW[what], 1), f"{name}: {what}", False
    other, content = _another(draw, old, kind)
    holder[key] = other
    return json.dumps(value), f"{name} is {other!r}", content


def _another(draw: Draw, old: Any, kind: str) -> tuple[Any, bool]:
    """Another value: of the same type, or of any."""
    if kind == "same" and isinstance(old, bool):
        return not old, True
    if kind == "same" and isinstance(old, (int, float)):
        return draw(st.sampled_from(NUMBERS)), True
    if kind == "same" and isinstance(old, str):
        return draw(st.sampled_from(TEXTS)), True
    if kind == "same" and isinstance(old, list):
        return (old * 2 if draw(st.booleans()) else old[::-1]), True
    other = draw(st.sampled_from(OTHERS))
    numbers = all(type(v) in (int, float) for v in (old, other))
    return other, numbers or type(other) is type(old)


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
    return what, f"{what} at {at}: {old} → {new}", what in ("value", "type of a tensor")


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


_KINDS = (
    "attribute", "dims", "type", "input", "output", "op", "external", "metadata", "drop", "double",
    "function", "raw", "graph input", "opset",
)  # fmt: skip


def _onnx(draw: Draw, path: Path) -> tuple[str, str, bool]:
    """The messages of a model, by onnx's own objects."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    kind = draw(st.sampled_from(_KINDS))
    nodes, tensors = list(model.graph.node), list(model.graph.initializer)
    node, tensor = draw(st.sampled_from(nodes)), draw(st.sampled_from(tensors))
    names = [name for each in nodes for name in (*each.input, *each.output)]
    detail, content = f"{node.op_type} {node.name}", True
    small = (0, -1, 1, 2, 3, 7, 64, 2**31 - 1, 2**62, -(2**63))
    if kind == "attribute" and node.attribute:
        chosen = draw(st.sampled_from(list(node.attribute)))
        detail += f".{chosen.name}"
        if chosen.ints:
            chosen.ints[0] = draw(st.sampled_from(small))
        else:
            chosen.i = draw(st.sampled_from(small))
    elif kind == "dims":
        detail, size = f"{tensor.name} {list(tensor.dims)}", math.prod(tensor.dims)
        if tensor.dims and draw(st.booleans()):
            tensor.dims[0] = draw(st.sampled_from(small))
        else:
            tensor.dims.append(draw(st.sampled_from(small)))
        content = math.prod(tensor.dims) == size
    elif kind == "type":
        tensor.data_type = draw(st.sampled_from((0, 1, 2, 3, 6, 7, 8, 10, 16, 17, 21, 23, 99)))
        detail = tensor.name
    elif kind in ("input", "output"):
        values = node.input if kind == "input" else node.output
        if values:
            values[draw(st.integers(0, len(values) - 1))] = draw(
                st.sampled_from((*names, "", "no"))
            )
    elif kind == "op":
        node.op_type = draw(
            st.sampled_from(("Add", "Loop", "If", "Scan", "Cast", "Nothing", "EPContext"))
        )
    elif kind == "external":
        detail = _external(draw, tensor)
        content = False
    elif kind == "metadata" and model.metadata_props:
        entry = draw(st.sampled_from(list(model.metadata_props)))
        try:
            entry.value, detail, content = changed_json(draw, entry.value)
        except ValueError:
            entry.value = draw(st.sampled_from(TEXTS))
    elif kind == "drop":
        del model.graph.node[draw(st.integers(0, len(nodes) - 1))]
    elif kind == "double":
        model.graph.node.append(node)
        content = False
    elif kind == "function" and model.functions:
        chosen = draw(st.sampled_from(list(model.functions)))
        inner = draw(st.sampled_from(list(chosen.node)))
        inner.op_type, inner.domain = chosen.name, chosen.domain
        detail, content = f"{chosen.name} calls itself", False
    elif kind == "raw":
        tensor.raw_data = draw(st.binary(max_size=16))
        detail, content = tensor.name, False
    elif kind == "graph input":
        leaf = draw(st.sampled_from([*model.graph.input, *model.graph.output]))
        leaf.type.tensor_type.elem_type = draw(st.sampled_from((0, 1, 7, 8, 10, 99)))
    elif kind == "opset":
        draw(st.sampled_from(list(model.opset_import))).version = draw(
            st.sampled_from((0, 1, 5, 99))
        )
    path.write_bytes(model.SerializeToString())
    return kind, detail, content


def _external(draw: Draw, tensor: Any) -> str:
    """Another place of a tensor's bytes."""
    places = ("../x", "/etc/hostname", "a/../../x", "", "model.onnx", "model.onnx.data", "no", "\0")
    numbers = ("0", "1", "-1", "4096", str(2**62), str(2**64), "x", "0x10", "１")
    key = draw(st.sampled_from(("location", "offset", "length", "basepath", "location")))
    value = draw(st.sampled_from(places if key == "location" else numbers))
    found = [entry for entry in tensor.external_data if entry.key == key]
    entry = found[0] if found and draw(st.booleans()) else tensor.external_data.add(key=key)
    entry.value = value
    tensor.data_location = 1
    return f"{tensor.name}: {key} {value!r}"

"""What was quantized, how, and why: a row for each layer of a program or an exported model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora_compile.brief import megabytes
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_files, check_output
from qalora_compile.ir.coreml_package import coreml_metadata, read_specification
from qalora_compile.ir.onnx_metadata import (
    OnnxLayer,
    OnnxMetadata,
    metadata_of,
    read_onnx_metadata,
)
from qalora_compile.ir.openvino_metadata import openvino_metadata, read_openvino
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.stages import CODE_NAMES, FOLDED, TRAINED_NAMES
from qalora_compile.ir.view.netron import write_structure
from qalora_compile.ir.view.svg import to_dot, to_svg
from qalora_compile.untrusted.artifacts import (
    COREML_FILE,
    OPENVINO_FILE,
    TORCH_FILE,
    encoder_decoder_files,
    model_file,
    onnx_parts,
)
from qalora_compile.untrusted.pt2_file import read_pt2

_LAYERS = "layers to "
Row = dict[str, Any]


def draw(program: Program, files: Mapping[str, Path], only: str | None = None) -> None:
    """Write the graph of a program to new files.

    Args:
        program: At any stage.
        files: Form (`text`, `dot`, `svg` or `netron`) → file.
        only: Dotted path of the part to draw; the text form always shows the complete graph.

    Raises:
        UserInputError: a file exists, or no node has the path `only`.
        OutputError: a file cannot be written.
    """
    forms: dict[str, Callable[[], str]] = {
        "text": lambda: str(program),
        "dot": lambda: to_dot(program, only),
        "svg": lambda: to_svg(program, only),
    }
    for path in files.values():
        check_output(path, overwrite=False, is_file=True)
    for name, path in files.items():
        if name == "netron":
            write_structure(program, path, only)
            continue
        text = forms[name]()
        with atomic_files(path) as scratch:
            scratch.write_text(text, "utf-8")


def inspect_program(program: Program) -> tuple[list[Row], Row]:
    """A row for each layer of a program, and totals."""
    tensors = program.tensors()
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    seen: set[str] = set()
    rows = []
    for site in program.plan:
        row = _site_row(site, program.stage, sizes, seen)
        if site.weight in tensors and not site.n:
            row["shape"] = "×".join(map(str, tensors[site.weight].shape))
        rows.append(row)
    decisions = Counter(row["decision"] for row in rows)
    return rows, {
        "stage": program.stage,
        **{f"{_LAYERS}{name}": count for name, count in sorted(decisions.items())},
        **_zero_points(rows),
        "bytes of all tensors": sum(sizes.values()),
        "size": megabytes(sum(sizes.values())),
        "passes": " → ".join(program.history),
        **({"notes": "; ".join(program.notes)} if program.notes else {}),
    }


def _site_row(site: Site, stage: str, sizes: dict[str, int], seen: set[str]) -> Row:
    """A site's row; a shared tensor counts for the first site that reads it, kept in `seen`."""
    own = (
        [site.weight]
        if site.bits is None
        else [f"{site.path}.{part}" for part in (*CODE_NAMES, *TRAINED_NAMES)]
    )
    form = (
        "integer" if site.has_integer_zero_point else "real (folded)" if stage == FOLDED else "real"
    )
    row = {
        "path": site.name,
        "kind": site.kind,
        "weight": site.weight,
        "shape": site.shape or None,
        "K×N": site.shape or None,
        "bits": site.bits,
        "group": site.group_size,
        "zero-point": form if site.bits is not None else None,
        "rank": site.rank,
        "bytes": sum(sizes.get(name, 0) for name in own if name not in seen),
        "decision": site.decision,
        "reason": site.reason,
        "why": "; ".join(filter(None, (site.why_bits, site.why_rank))),
    }
    seen.update(own)
    return row


def _zero_points(rows: list[Row]) -> Row:
    kinds = dict.fromkeys(row["zero-point"] for row in rows if row["zero-point"])
    return {"zero-points": ", ".join(kinds)} if kinds else {}


def inspect_exported(path: Path) -> tuple[list[Row], Row]:
    """A row for each layer of an exported model, the encoder's first, and totals.

    Raises:
        UserInputError: there is no model, or another package exported it.
    """
    halves = encoder_decoder_files(path)
    if halves is None:
        return _inspect_file(_model_in(path) if path.is_dir() else path)
    parts = {file.name: _inspect_file(file) for file in halves}
    rows = [row | {"file": file} for file, (found, _) in parts.items() for row in found]
    totals = [totals for _, totals in parts.values()]
    read = [{row["weight"]: row["bytes"] for row in found} for found, _ in parts.values()]
    both = {name: size for name, size in read[0].items() if size and name in read[1]}
    return rows, {
        **totals[0],
        **{
            name: sum(part.get(name, 0) for part in totals)
            for name in dict.fromkeys(key for part in totals for key in part)
            if name.startswith(_LAYERS)
        },
        "size": ", ".join(f"{file}: {found['size']}" for file, (_, found) in parts.items()),
        "in both files": ", ".join(f"{n} ({megabytes(s)})" for n, s in both.items()) or "nothing",
    }


def _model_in(folder: Path) -> Path:
    """The file of a model with a single graph."""
    if folder.suffix == Path(COREML_FILE).suffix:
        return folder
    others = (folder / OPENVINO_FILE, folder / TORCH_FILE, folder / COREML_FILE)
    return next((file for file in others if file.exists()), model_file(folder))


def _inspect_file(file: Path) -> tuple[list[Row], Row]:
    if not file.exists():
        raise UserInputError(f"there is no file {file}", where=str(file))
    metadata, parts = _metadata_of(file)
    rows = [_onnx_row(layer, metadata.target) for layer in metadata.layers]
    decisions = Counter(row["decision"] for row in rows)
    size = sum(part.stat().st_size for part in parts)
    return rows, {
        "stage": metadata.stage,
        "target": metadata.target,
        **{f"{_LAYERS}{name}": count for name, count in sorted(decisions.items())},
        **_zero_points(rows),
        "size": megabytes(size),
        "passes": " → ".join(metadata.history),
    }


def _metadata_of(file: Path) -> tuple[OnnxMetadata, list[Path]]:
    """The metadata of an exported model, and its files."""
    if file.suffix == Path(COREML_FILE).suffix:
        parts = [part for part in file.rglob("*") if part.is_file()]
        return coreml_metadata(read_specification(file), file), parts
    if file.suffix == Path(TORCH_FILE).suffix:
        return metadata_of(read_pt2(file).metadata, file), [file]
    if file.suffix == Path(OPENVINO_FILE).suffix:
        return openvino_metadata(read_openvino(file), file), [file, file.with_suffix(".bin")]
    return read_onnx_metadata(file), onnx_parts(file)


_FORMS = {"openvino": "real", "ort": "real", "torch": "real", "coreml": "real"}
"""How targets hold zero-points, where it is not the form of MatMulNBits."""


def _onnx_row(layer: OnnxLayer, target: str) -> Row:
    """The row of a layer of an exported file."""
    matrix = "×".join(str(d) for d in (layer.experts, layer.k, layer.n) if d) or None
    stored = "×".join(map(str, layer.shape or ())) or None
    quantized = layer.bits is not None
    return {
        "path": layer.site,
        "kind": layer.kind,
        "weight": layer.weight,
        "shape": matrix or stored,
        "K×N": matrix,
        "bits": layer.bits,
        "group": layer.group_size if quantized else None,
        "zero-point": _FORMS.get(target, "integer + correction") if quantized else None,
        "rank": None,
        "bytes": layer.bytes,
        "decision": layer.decision,
        "reason": target if quantized else layer.reason,
        "why": layer.why_bits,
    }


_NUMBER = re.compile(r"(?<![^.@])\d+(?![^.@])")
"""A complete part of a dotted path: the 3 of `layers.3.fc1`, not the 1."""


_OWN = ("path", "weight", "bytes", "why")
"""Columns in which the rows of a group may differ."""


def group_equal_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each group of rows that differ only in numbers, at the place of the first.

    The numbers in `path` and `weight` become ranges (`layers.{0..11}.q_proj`), `bytes` the sum,
    and `count` is the number of rows. `why`, which differs from row to row, is left out.
    """
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        rest = tuple(pattern_of(value) for name, value in row.items() if name not in _OWN)
        groups[(pattern_of(row["path"]), *rest)].append(row)
    return [
        {
            **same[0],
            "path": ranges_of([row["path"] for row in same]),
            "weight": ranges_of([row["weight"] for row in same]),
            "bytes": sum(row["bytes"] for row in same),
            "reason": ranges_of([row["reason"] for row in same]),
            "count": len(same),
        }
        | ({"why": ""} if len(same) > 1 else {})
        for same in groups.values()
    ]


def pattern_of(value: object) -> object:
    """A text with its numbers replaced by a placeholder; other values unchanged."""
    return _NUMBER.sub("#", value) if isinstance(value, str) else value


def ranges_of(texts: Sequence[str]) -> str:
    """Merge texts that differ only in numbers, with the varying numbers in braces."""
    columns = zip(*(map(int, _NUMBER.findall(text)) for text in texts), strict=True)
    shown = iter([_braces(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(shown), texts[0])


def _braces(numbers: Sequence[int]) -> str:
    """`7`, `{0..11}` or `{0..3,8}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{{{','.join(parts)}}}" if len(numbers) > 1 else str(numbers[0])

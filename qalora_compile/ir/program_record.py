"""`program.json`, the record of a program folder: files, versions and digests; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.sealed import check_files, digests_of, read_sealed, write_sealed
from qalora_compile.untrusted import check_folder, quoted
from qalora_compile.untrusted.artifacts import PROGRAM_FILE

FORMAT = "qalora-program"
VERSION = 3
"""The format version that is written; earlier versions are read too."""
_VERSIONS = (1, 2, VERSION)
_SEALED = 2
"""The first version that has digests."""
_RENAMED_OPERATORS = {
    "qalora.whole_linear.default": "qalora.integer_zero_linear.default",
    "qalora.spread_groups.default": "qalora.pad_groups.default",
}
_RENAMED_FIELDS = {"whole": "frozen_integer_zero", "integer": "integer_zero_point"}
"""Names that version 3 changed: of operators, and of fields of the site plan."""

_FACTS = {
    "stage": str,
    "training": bool,
    "plan": list,
    "signature": dict,
    "history": list,
    "notes": list,
    "trained": list,
    "ties": dict,
    "trainable": list,
    "parameters": list,
    "graph": dict,
}
"""The entries of a record, and their types."""
_TEXTS = ("history", "notes", "trained", "ties", "trainable", "parameters")
_LATER = ("trained",)
"""Entries that the first folders lack, with their defaults."""

TENSORS_FILE = "quantized.safetensors"
ADAPTERS_FILE = "adapters.safetensors"
EXAMPLE_FILE = "example.safetensors"


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    """Write `program.json` after the tensor files, whose digests it holds."""
    files = digests_of(folder, _present(folder, (TENSORS_FILE, ADAPTERS_FILE, EXAMPLE_FILE)))
    head = {"format": FORMAT, "version": VERSION, "files": files}
    write_sealed(folder / PROGRAM_FILE, head | facts)


def read_record(folder: Path) -> dict[str, Any]:
    """Read `program.json`, and compare the files with tensors with their digests.

    Raises:
        UserInputError: it is missing, malformed, changed or of a later version; or the folder holds
            a link or a device.
    """
    if not folder.is_dir():
        raise UserInputError(f"there is no program folder {folder}", where=str(folder))
    check_folder(folder)
    value = read_sealed(folder / PROGRAM_FILE, since=_SEALED)
    if value.get("format") != FORMAT:
        raise UserInputError(f"{folder} holds no program of this package", where=str(folder))
    if value.get("version") not in _VERSIONS:
        raise UserInputError(
            f"the folder has format version {quoted(value.get('version'))}, this package reads "
            f"versions {_VERSIONS[0]} to {VERSION}",
            where=str(folder),
            hint="read it with the version of qalora-compile that wrote it",
        )
    _check_facts(value, folder)
    if value["version"] >= _SEALED:
        check_files(folder, value.get("files"))
        unknown = set(_present(folder, (TENSORS_FILE, ADAPTERS_FILE))) - set(value["files"])
        if unknown:
            raise UserInputError(
                f"{PROGRAM_FILE} holds no digest of {sorted(unknown)[0]}", where=str(folder)
            )
    return value if value["version"] == VERSION else _with_new_names(value)


def _with_new_names(value: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier version, with the names of this one."""
    plan = [
        {_RENAMED_FIELDS.get(name, name): field for name, field in row.items()}
        if isinstance(row, dict)
        else row
        for row in value["plan"]
    ]
    return value | {"plan": plan, "graph": _renamed_graph(value["graph"])}


def _renamed_graph(graph: Any) -> Any:
    """A graph whose operators have the names of this version; malformed parts stay as they are."""
    if not isinstance(graph, dict):
        return graph
    nodes, inner = graph.get("nodes"), graph.get("subgraphs")
    if isinstance(nodes, list):
        renamed = [
            node | {"target": _RENAMED_OPERATORS.get(str(node.get("target")), node.get("target"))}
            if isinstance(node, dict) and "target" in node
            else node
            for node in nodes
        ]
        graph = graph | {"nodes": renamed}
    if isinstance(inner, dict):
        graph = graph | {"subgraphs": {name: _renamed_graph(each) for name, each in inner.items()}}
    return graph


def _check_facts(value: dict[str, Any], folder: Path) -> None:
    """Refuse a record whose entries are missing or of other types than `write_program` writes."""
    for name, kind in _FACTS.items():
        entry: Any = value.get(name, [] if name in _LATER else None)
        texts = entry.values() if isinstance(entry, dict) else entry
        if not isinstance(entry, kind) or (
            name in _TEXTS and not all(isinstance(text, str) for text in texts)
        ):
            raise UserInputError(
                f"{PROGRAM_FILE} is malformed: {name} is {quoted(entry)}",
                where=str(folder / PROGRAM_FILE),
            )


def tensor_files(folder: Path) -> list[str]:
    """Names of the files that hold a program's tensors."""
    return _present(folder, (TENSORS_FILE, ADAPTERS_FILE))


def admit_file(folder: Path, name: str, digests: list[str]) -> None:
    """Accept these digests, and no others, for a file of the folder."""
    value = read_sealed(folder / PROGRAM_FILE, since=_SEALED)
    if "files" in value:
        value["files"][name] = digests
        write_sealed(folder / PROGRAM_FILE, value)


def _present(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]

"""What a certificate says of the two graphs and of the software that compared them."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qalora_compile._version import __version__
from qalora_compile.verify.proof.certificate import GraphRecord
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.read_fx import describe_program, read_program_graph
from qalora_compile.verify.proof.open_graph import files_of
from qalora_compile.verify.proof.tokenizer_digests import tokenizer_digests

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program


def record_of(thing: Program | str | Path, graph: Graph, folder: Path | None) -> GraphRecord:
    """The record of a graph; `folder` may hold the tensors of a program in memory."""
    if isinstance(thing, (str, Path)):
        path = Path(thing)
        return GraphRecord(
            graph.label,
            graph.dialect,
            graph.stage,
            str(path),
            files_of(path),
            tensors=None,
            tokenizer=tokenizer_digests(path),
        )
    hashed = hashlib.sha256()
    for name, stored in sorted(graph.tensors.items()):
        hashed.update(f"{name} {stored.digest}\n".encode())
    record = GraphRecord(
        graph.label,
        graph.dialect,
        graph.stage,
        path=None,
        files={},
        tensors=hashed.hexdigest(),
        tokenizer={} if folder is None else tokenizer_digests(folder),
    )
    if folder is None or not _has_tensors(folder, graph):
        return record
    described = describe_program(thing)
    return dataclasses.replace(record, path=str(folder), files=files_of(folder), graph=described)


def _has_tensors(folder: Path, graph: Graph) -> bool:
    """Whether the tensors of a program in memory are those of a program folder."""
    stored = read_program_graph(folder).tensors
    return all(
        name in stored and stored[name].digest == tensor.digest
        for name, tensor in graph.tensors.items()
    )


def versions() -> dict[str, str]:
    """The versions of this package, Python and numpy."""
    found = {"qalora-compile": __version__, "python": platform.python_version()}
    return found | {"numpy": np.__version__}

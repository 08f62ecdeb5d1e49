"""A small Llama with its cache, exported for every target, whose faults `mutations` generates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

import qalora_compile as qc
from qalora_compile.errors import QaloraError
from qalora_compile.verify import compare_structure
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.read_fx import program_graph
from tests.models import adapted, llama, token_ids
from tests.verify.mutations import Mutant

TARGETS = ("ort", "ort-stock", "onnx")


@dataclass(frozen=True)
class Exported:
    """The program as a graph, and its exports by target."""

    program: qc.Program
    graph: Graph
    paths: dict[str, Path]

    def model(self, target: str) -> Any:
        """An export in memory."""
        return onnx.load(self.paths[target])

    def is_proved(self, target: str, model: Any) -> bool:
        """Whether a changed export is proved equal to the program outside of its layers."""
        path = self.paths[target].with_name("changed.onnx")
        onnx.save(model, path)
        try:
            found = compare_structure(self.graph, path)
        except QaloraError:  # the file is refused
            return False
        return found.same and not any(pair.problem for pair in found.pairs)


def export_transformer(folder: Path) -> Exported:
    """Make it, in folders by target."""
    torch.manual_seed(0)
    model = llama()
    program = qc.add_kv_cache(qc.fold_adapters(adapted(model, (token_ids(2, 16),))), model)
    paths = {}
    for target in TARGETS:
        paths[target] = folder / target / "model.onnx"
        paths[target].parent.mkdir(parents=True)
        qc.export_model(program, paths[target], qc.ExportSpec(target=target))
    return Exported(program, program_graph(program), paths)


def judged(
    exported: Exported, target: str, changes: Callable[[Any], Iterator[Mutant]], every: int = 1
) -> dict[str, bool]:
    """Whether each change of an export, or every so many-th, is proved equal."""
    chosen = itertools.islice(changes(exported.model(target)), 0, None, every)
    return {f"{target}: {name}": exported.is_proved(target, made) for name, made in chosen}

"""What can be compared by proof: programs, program folders, exported models, export folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.errors import UserInputError
from qalora_compile.ir.program_record import PROGRAM_FILE, tensor_files
from qalora_compile.sealed import digest_of_file
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.read_fx import program_graph, read_program_graph
from qalora_compile.verify.proof.graphs.read_onnx import read_onnx_graph
from qalora_compile.verify.proof.weights.find_lookups import find_lookups

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program

_MODEL_FILE, _SUFFIX = "model.onnx", ".onnx"
_HALVES = ("encoder_model.onnx", "decoder_model.onnx")


def open_graph(thing: Program | Graph | str | Path) -> Graph:
    """The graph of a program, or of what a path names; only a program in memory needs torch.

    Raises:
        UserInputError: the path is missing or is of no known kind, or the folder holds two graphs.
    """
    if isinstance(thing, Graph):
        return thing
    if not isinstance(thing, (str, Path)):
        return program_graph(thing)
    path = Path(thing)
    if (path / PROGRAM_FILE).exists():
        return read_program_graph(path)
    model = path / _MODEL_FILE if path.is_dir() else path
    if model.suffix == _SUFFIX and model.exists():
        return find_lookups(read_onnx_graph(model))
    halves = [path / file for file in _HALVES if (path / file).exists()]
    if halves:
        raise UserInputError(
            f"{path} is an encoder-decoder model: two graphs, which are compared one by one",
            where=", ".join(half.name for half in halves),
            hint="encoder, decoder = qc.split_encoder_decoder(program, model), then compare each "
            "with its file; or compare the outputs of both: verify A B --max-rel 1e-4",
        )
    raise UserInputError(
        f"{path} is neither a program folder nor an ONNX model",
        where=str(path),
        hint="give a folder written by Program.save, finetune, fold or export, or a .onnx file",
    )


def open_graphs(thing: Program | Graph | str | Path) -> tuple[Graph, ...]:
    """The graphs of a side: one, or encoder and decoder, to be looked at and not to be compared.

    Raises:
        UserInputError: see `open_graph`.
    """
    if isinstance(thing, (str, Path)):
        halves = [Path(thing) / file for file in _HALVES]
        if all(half.exists() for half in halves):
            return tuple(find_lookups(read_onnx_graph(half)) for half in halves)
    return (open_graph(thing),)


def files_of(path: Path) -> dict[str, str]:
    """SHA-256 of every file that the meaning of a side depends on, by name.

    Raises:
        UserInputError: the path is of no side: a certificate may name any file.
    """
    if (path / PROGRAM_FILE).exists():
        names = [PROGRAM_FILE, *tensor_files(path)]
        return {name: digest_of_file(path / name) for name in names}
    model = path / _MODEL_FILE if path.is_dir() else path
    if model.suffix != _SUFFIX:
        raise UserInputError(
            f"{path} is neither a program folder nor an ONNX model", where=str(path)
        )
    names = [model.name, *sorted(_external(model))]
    return {name: digest_of_file(model.parent / name) for name in names}


def _external(model: Path) -> set[str]:
    """Names of the files beside a model that its weights are in."""
    graph = read_onnx_graph(model)
    rows = (
        entry.value
        for proto in graph.extra.graph.initializer
        if proto.data_location == 1
        for entry in proto.external_data
        if entry.key == "location"
    )
    return set(rows)

"""Opens the graphs of programs, program folders, exported models and export folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.program_record import tensor_files
from qalora_compile.sealed import digest_of_file
from qalora_compile.untrusted.artifacts import (
    PROGRAM_FILE,
    ArtifactKind,
    encoder_decoder_files,
    find_artifact,
    unknown_artifact,
)
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.read_coreml import read_coreml_graph
from qalora_compile.verify.proof.graphs.read_fx import program_graph, read_program_graph
from qalora_compile.verify.proof.graphs.read_onnx import read_onnx_graph
from qalora_compile.verify.proof.graphs.read_openvino import read_openvino_graph
from qalora_compile.verify.proof.graphs.read_pt2 import read_pt2_graph
from qalora_compile.verify.proof.weights.find_layers import find_layers
from qalora_compile.verify.proof.weights.find_lookups import find_lookups

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program


def open_graph(thing: Program | Graph | str | Path) -> Graph:
    """The graph of a program or of a path; only a program in memory needs torch.

    Raises:
        UserInputError: the path is missing or of an unknown kind, or the folder holds two graphs.
        UnsupportedError: it is a `.pt2` file or a Core ML package, whose graph is run only.
    """
    if isinstance(thing, Graph):
        return thing
    if not isinstance(thing, (str, Path)):
        return program_graph(thing)
    found = find_artifact(thing)
    if found is not None and found.kind is ArtifactKind.PROGRAM:
        return read_program_graph(found.path)
    if found is not None and found.kind is ArtifactKind.ONNX:
        return find_lookups(find_layers(read_onnx_graph(found.path)))
    if found is not None and found.kind is ArtifactKind.OPENVINO:
        return read_openvino_graph(found.path)
    if found is not None and found.kind in (ArtifactKind.TORCH, ArtifactKind.COREML):
        raise UnsupportedError(
            f"{found.path.name} has no form in a proof, nor in a comparison value by value",
            where=str(found.path),
            hint="compare its outputs and layers: verify A B --max-rel 1e-4",
        )
    if found is not None and found.kind is ArtifactKind.ENCODER_DECODER:
        raise UserInputError(
            f"{thing} is an encoder-decoder model: two graphs, which are compared one by one",
            where=", ".join(file.name for file in encoder_decoder_files(found.path) or ()),
            hint="verify FOLDED EDGE --prove takes both; in Python, encoder, decoder = "
            "qc.split_encoder_decoder(program, model), then compare each with its file",
        )
    raise unknown_artifact(thing)


def open_graphs(thing: Program | Graph | str | Path) -> tuple[Graph, ...]:
    """The graphs of a program or path, for display: one, or encoder and decoder.

    Raises:
        UserInputError: see `open_graph`.
    """
    if isinstance(thing, (str, Path)):
        halves = encoder_decoder_files(Path(thing))
        if halves is not None and all(half.exists() for half in halves):
            return tuple(map(_read_half, halves))
        found = find_artifact(thing)
        if found is not None and found.kind is ArtifactKind.TORCH:
            return (read_pt2_graph(found.path),)
        if found is not None and found.kind is ArtifactKind.COREML:
            return (read_coreml_graph(found.path),)
    return (open_graph(thing),)


def _read_half(path: Path) -> Graph:
    if path.suffix == ".xml":
        return read_openvino_graph(path)
    return find_lookups(read_onnx_graph(path))


def files_of(path: Path) -> dict[str, str]:
    """SHA-256 of every file that the graph of a path depends on, by name.

    Raises:
        UserInputError: the path is not of such a graph; a certificate may name any file.
    """
    found = find_artifact(path)
    if found is not None and found.kind is ArtifactKind.PROGRAM:
        names = [PROGRAM_FILE, *tensor_files(path)]
        return {name: digest_of_file(path / name) for name in names}
    if found is not None and found.kind is ArtifactKind.OPENVINO:
        both = (found.path, found.path.with_suffix(".bin"))
        return {file.name: digest_of_file(file) for file in both}
    if found is None or found.kind is not ArtifactKind.ONNX:
        raise unknown_artifact(path)
    return onnx_files(found.path, read_onnx_graph(found.path).extra)


def onnx_files(path: Path, model: Any) -> dict[str, str]:
    """SHA-256 of the file of a loaded ONNX model and of its external data, by name."""
    rows = {
        entry.value
        for proto in model.graph.initializer
        if proto.data_location == 1
        for entry in proto.external_data
        if entry.key == "location"
    }
    return {name: digest_of_file(path.parent / name) for name in [path.name, *sorted(rows)]}

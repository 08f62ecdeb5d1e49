"""Core ML packages of this package as graphs without nodes: their inputs."""

from __future__ import annotations

from pathlib import Path

from qalora_compile.ir.coreml_package import coreml_metadata, read_specification
from qalora_compile.ir.onnx_metadata import explain_metadata
from qalora_compile.verify.proof.graphs.graph import COREML, Graph


def read_coreml_graph(path: Path) -> Graph:
    """The inputs, by the metadata of the package.

    Raises:
        UserInputError, UnsupportedError: see `read_specification` and `coreml_metadata`.
    """
    metadata = coreml_metadata(read_specification(path), path)
    with explain_metadata(path):
        leaves = metadata.signature["inputs"]
        inputs = {leaf["name"]: (leaf["name"], leaf.get("dtype")) for leaf in leaves}
        return Graph(COREML, str(path), metadata.target, {}, inputs, {}, {}, {}, {})
